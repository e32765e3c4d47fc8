#!/usr/bin/env bash
# A spot TPU slice from the queue, without Kubernetes: asks for it, waits, installs, runs the job on all of its hosts, and
# asks again where it is taken away, until the job is complete. Needs gcloud, logged in.
#
#   PROJECT=mine ZONE=us-west4-a NAME=kandinsky TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     tpu_scripts/pods/queued_resources.sh gs://bucket/prompts.jsonl --output gs://bucket/pictures --batch 8
#
# What follows the name of the script goes to `kandinsky-jax batch` as it is.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8p' "$0"; exit 2; }
: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}"
NAME=${NAME:-kandinsky}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SOURCE=${SOURCE:-git+https://github.com/kandinsky-jax/kandinsky-jax}
place=(--project="$PROJECT" --zone="$ZONE")

state() { gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null; }
remove() { gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet >/dev/null 2>&1 || true; }
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"; }
trap remove EXIT

printf -v words '%q ' "$@"
while true; do
    case "$(state || true)" in
        ACTIVE)
            on_all "pip install -q 'kandinsky-jax[tpu,batch] @ $SOURCE'" &&
                on_all "~/.local/bin/kandinsky-jax batch $words --distributed --grace 20 --quiet" && exit 0
            echo "the job ended early; going on" >&2
            sleep 20
            ;;
        SUSPENDED | SUSPENDING | FAILED)
            echo "the slice was taken away; asking for another" >&2
            remove
            ;;
        "")
            gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
                --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot
            ;;
        *) sleep 30 ;;
    esac
done
