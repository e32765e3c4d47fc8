#!/usr/bin/env bash
# A spot TPU slice from the queue, without Kubernetes: asks for it, waits, installs, runs a batch job or a training on all of
# its hosts, and asks again where it is taken away, until it is complete. Needs gcloud, logged in.
#
#   export PROJECT=mine ZONE=us-west4-a NAME=kandinsky TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   tpu_scripts/pods/queued_resources.sh batch gs://bucket/prompts.jsonl --output gs://bucket/pictures --batch 8
#   tpu_scripts/pods/queued_resources.sh train lora-decoder gs://bucket/train.toml
#
# What follows the name of the script goes to `kandinsky-jax` as it is. ACCOUNT is the machines' service account; without it
# they have the project's default one. The slice is deleted when the script ends, in whichever way. TRIES (20) is how often
# the program may end early on a slice that is still there, before the script gives up: then it is no preemption.
# KANDINSKY_JAX_CACHE=gs://bucket/compiled keeps compiled programs for the next start; who may write there: training.md.
set -euo pipefail

case "${1:-}" in
    batch) extras=tpu,batch options=(--distributed --grace 20 --quiet) ;;
    train) extras=tpu,batch,train options=(--distributed --quiet) ;;
    *) sed -n '2,12p' "$0"; exit 2 ;;
esac
: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}"
NAME=${NAME:-kandinsky}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SOURCE=${SOURCE:-git+https://github.com/kandinsky-jax/kandinsky-jax}
TRIES=${TRIES:-20}
place=(--project="$PROJECT" --zone="$ZONE")

state() { gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null; }
remove() { gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet >/dev/null 2>&1 || true; }
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"; }
install() { # the machines' own Python may be too old
    on_all "python3 -m pip install -q uv && python3 -m uv venv -q --clear --python 3.12 kandinsky &&
        python3 -m uv pip install -q --python kandinsky/bin/python 'kandinsky-jax[$extras] @ $SOURCE'"
}
trap remove EXIT

printf -v words '%q ' "$@" "${options[@]}"
printf -v cache '%q' "${KANDINSKY_JAX_CACHE:-}"
early=0
while true; do
    case "$(state || true)" in
        ACTIVE)
            install && on_all "${KANDINSKY_JAX_CACHE:+KANDINSKY_JAX_CACHE=$cache }kandinsky/bin/kandinsky-jax $words" && exit 0
            early=$((early + 1))
            [ "$early" -lt "$TRIES" ] || { echo "ended early $early times; giving up" >&2; exit 1; }
            echo "ended early; going on" >&2
            sleep 60 # until the other hosts have noticed
            ;;
        SUSPENDED | SUSPENDING | FAILED)
            echo "the slice was taken away; asking for another" >&2
            early=0
            remove
            ;;
        "")
            gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
                --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot \
                ${ACCOUNT:+--service-account="$ACCOUNT"}
            ;;
        *) sleep 30 ;;
    esac
done
