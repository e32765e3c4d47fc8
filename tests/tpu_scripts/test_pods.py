"""Files for pods: manifests consistent with each other and the program, a script, a notebook that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster
from PIL import Image

from kandinsky_jax.cli import app
from kandinsky_jax.compilation import CACHE
from kandinsky_jax.parallel.process import VARIABLES
from kandinsky_jax.preemption import STOPPED
from kandinsky_jax.training.config import load
from kandinsky_jax.training.data import listing
from kandinsky_jax.training.kinds import Kind

ROOT = Path(__file__).parents[2]
PODS = ROOT / "tpu_scripts" / "pods"
GUIDES = ("README.md", "batch.md", "training.md")
SLICES = {  # accelerator and topology of GKE: chips of a host, hosts
    ("tpu-v5-lite-podslice", "2x2"): (4, 1),
    ("tpu-v5-lite-podslice", "2x4"): (8, 1),
    ("tpu-v5-lite-podslice", "4x4"): (4, 4),
    ("tpu7x", "2x2x2"): (4, 2),
}
TRAINING = ("train_jobset.yaml", "train_jobset_flex.yaml", "train_jobset_slices.yaml")
SPOT_SECONDS = 15  # what GKE leaves pods of a spot node, unless the node pool says more


def options_of(command: str) -> set[str]:
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}


def manifest(name: str) -> dict:
    return yaml.safe_load((PODS / name).read_text())


def job_of(found: dict) -> dict:
    if found["kind"] == "Job":
        return found["spec"]
    [replicated] = found["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.mark.parametrize("name", ["indexed_job.yaml", "jobset.yaml", *TRAINING])
def test_a_manifest_agrees_with_itself_and_the_program(name):
    job = job_of(manifest(name))
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    command, *arguments = container["args"]
    assert {word.split("=")[0] for word in arguments if word.startswith("-")} <= options_of(command)
    assert job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"
    selector = pod["nodeSelector"]
    place = (selector["cloud.google.com/gke-tpu-accelerator"], selector["cloud.google.com/gke-tpu-topology"])
    chips, hosts = SLICES[place]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    mounts = {volume["name"] for volume in container.get("volumeMounts", ())}
    assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
    if name == "indexed_job.yaml":
        assert hosts == 1
        [(_, total)] = [pair for pair in VARIABLES if pair[0] == "JOB_COMPLETION_INDEX"]
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        assert values[total] == str(job["completions"])
    else:
        assert job["completions"] == hosts
        assert "--distributed" in arguments
        assert pod.get("hostNetwork", False) == (pod.get("dnsPolicy") == "ClusterFirstWithHostNet")
    if command == "batch":
        [grace] = [float(word.split("=")[1]) for word in arguments if word.startswith("--grace=")]
        assert grace < pod["terminationGracePeriodSeconds"] <= SPOT_SECONDS


@pytest.mark.parametrize("name", ["indexed_job.yaml", "jobset.yaml", *TRAINING])
def test_a_manifest_shares_compiled_programs_beside_what_it_writes(name):
    """In its own bucket, which the guide lets only the job's account write to; not in its output folder."""
    [container] = job_of(manifest(name))["template"]["spec"]["containers"]
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    assert values[CACHE] == "gs://BUCKET/compiled"
    assert not any(values[CACHE] in argument for argument in container["args"])
    assert "roles/storage.objectUser" in (PODS / "training.md").read_text()


def test_a_preempted_batch_job_has_not_failed():
    rules = job_of(manifest("indexed_job.yaml"))["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"Ignore"}
    assert [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule] == [[STOPPED]]


@pytest.mark.parametrize("name", TRAINING)
def test_one_lost_host_of_a_training_restarts_all_and_a_checkpoint_is_no_failure(name):
    found = manifest(name)
    job = job_of(found)
    assert job["backoffLimit"] == 0  # one failed pod fails the slice, and JobSet restarts all slices
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    [container] = job["template"]["spec"]["containers"]
    assert by_code["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [STOPPED]}
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {by_code["action"], by_condition["action"]} == {"FailJob"}
    policy = found["spec"]["failurePolicy"]
    [rule] = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert 0 < policy["maxRestarts"] <= 100
    kind = container["args"][1]
    assert kind in set(Kind)
    assert container["args"][2].endswith(".toml")


def test_the_manifests_for_training_differ_in_the_machines_alone():
    one, flex, slices = (manifest(name) for name in TRAINING)
    assert slices["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert len({found["metadata"]["name"] for found in (one, flex, slices)}) == 3
    policies = [(found["spec"]["failurePolicy"], job_of(found)["podFailurePolicy"]) for found in (one, flex, slices)]
    assert policies[0] == policies[1] == policies[2]
    arguments = [job_of(found)["template"]["spec"]["containers"][0]["args"] for found in (one, flex, slices)]
    assert arguments[0] == arguments[1] == arguments[2]


def test_jax_numbers_the_hosts_of_all_slices(monkeypatch):
    """By the variables that GKE sets in pods of a JobSet, and at a port that the manifest opens."""
    found = manifest("train_jobset_slices.yaml")
    slices = found["spec"]["replicatedJobs"][0]["replicas"]
    hosts = job_of(found)["completions"]
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(["localhost"] * hosts))
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", str(slices))
    numbers = []
    for number in range(slices):
        for host in range(hosts):
            monkeypatch.setenv("MEGASCALE_SLICE_ID", str(number))
            monkeypatch.setenv("TPU_WORKER_ID", str(host))
            numbers.append(GkeTpuCluster.get_process_id())
    assert numbers == list(range(slices * hosts))
    assert GkeTpuCluster.get_process_count() == slices * hosts
    address = GkeTpuCluster.get_coordinator_address(10, None)
    [container] = job_of(found)["template"]["spec"]["containers"]
    assert int(address.rpartition(":")[2]) in [port["containerPort"] for port in container["ports"]]


def test_skypilot_restarts_after_a_checkpoint_and_hands_signals_on():
    task = manifest("train_skypilot.yaml")
    assert task["resources"]["use_spot"] is True
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [STOPPED]
    assert recovery["max_restarts_on_errors"] > 0
    *_, last = task["run"].splitlines()
    assert re.fullmatch(r'exec \S+/kandinsky-jax train "\$KIND" "\$CONFIG" --distributed --quiet', last)
    assert {*re.findall(r"\$([A-Z]+)", task["run"] + task["setup"]), CACHE} == set(task["envs"])
    assert task["envs"][CACHE] == "gs://BUCKET/compiled"
    assert task["envs"]["KIND"] in set(Kind)
    program = last.split()[1]
    assert f"venv --quiet --clear --python 3.12 {Path(program).parents[1]}\n" in task["setup"]


def test_the_commands_of_the_guides_and_the_files_exist():
    texts = [path.read_text() for path in sorted(PODS.iterdir()) if path.suffix in (".md", ".sh", ".yaml")]
    texts += [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    pattern = r"kandinsky-jax (batch status|batch|train) ([^`\n]*(?:\\\n[^`\n]*)*)"
    calls = [call for text in texts for call in re.findall(pattern, text)]
    for command, least in (("batch", 4), ("batch status", 2), ("train", 8)):
        found = [words for name, words in calls if name == command]
        assert len(found) >= least
        for words in found:
            assert set(re.findall(r"(?<!\S)--[a-z-]+", words)) <= options_of(command) | {"--help"}, words
    kinds = [words.split()[0] for name, words in calls if name == "train"]
    assert set(kinds) <= {*Kind, '"$KIND"', "KIND", "--distributed"}, kinds


def test_links_of_the_guides_lead_somewhere():
    for name in GUIDES:
        text = (PODS / name).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)]+)", text):
            file, _, anchor = target.partition("#")
            page = PODS / file if file else PODS / name
            assert page.exists(), f"{name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings}


def test_the_table_of_files_is_complete():
    text = (PODS / "README.md").read_text()
    assert [path.name for path in PODS.iterdir() if f"({path.name})" not in text and path.is_file()] == ["README.md"]


def test_the_configurations_of_the_guide_are_valid(tmp_path):
    text = (PODS / "training.md").read_text()
    [tried] = re.findall(r"<<'TOML'\n(.*?)TOML\n", text, re.DOTALL)
    [cloud] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    for content in (tried, cloud):
        (tmp_path / "train.toml").write_text(content)
        config = load(tmp_path / "train.toml")
    assert config.train_batch_size % 32 == 0  # chips of the largest manifest
    assert config.data.startswith("gs://")
    assert config.output.startswith("gs://")


GCLOUD = """#!/usr/bin/env bash
echo "$@" >> {log}
case "$*" in
    *describe*) head -n 1 {states}; sed -i 1d {states} ;;
    *"tpu-vm ssh"*"pip install"*) : ;;
    *"tpu-vm ssh"*) [ "$(grep -c '/kandinsky-jax ' {log})" -ge {succeeds} ] ;;
esac
"""


def run_script(folder: Path, states: str, succeeds: int, *words: str, **variables: str):
    """Run the script with a stand-in for gcloud that has these states, and whose n-th run of the program succeeds."""
    (folder / "states").write_text(states)
    (folder / "gcloud").write_text(GCLOUD.format(log=folder / "log", states=folder / "states", succeeds=succeeds))
    (folder / "sleep").write_text("#!/bin/sh\n")
    for name in ("gcloud", "sleep"):
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PROJECT": "p", "ZONE": "z"} | variables
    done = subprocess.run(
        [PODS / "queued_resources.sh", *words], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return done, lines


CALLS = {
    "batch": ("gs://b/a b.jsonl", "--output", "gs://b/out"),
    "train": ("lora-decoder", "gs://b/a b.toml", "--accept-changes"),
}


@pytest.mark.parametrize("command", CALLS)
def test_the_script_for_queued_resources(tmp_path, command):
    """It asks for a slice, runs the program, asks again after a preemption, and tidies up."""
    states = "\nWAITING\nACTIVE\nSUSPENDED\n\nACTIVE\n"
    cache = {CACHE: "gs://b/a b"} if command == "batch" else {}
    done, lines = run_script(tmp_path, states, 2, command, *CALLS[command], ACCOUNT="a@p", **cache)
    assert done.returncode == 0, done.stderr
    created = [line for line in lines if "queued-resources create" in line]
    assert len(created) == 2
    assert all("--spot" in line and "--service-account=a@p" in line for line in created)
    installed = [line for line in lines if "kandinsky-jax[" in line]
    assert len(installed) == 2
    assert ("[tpu,batch,train]" in installed[0]) == (command == "train")
    runs = [line for line in lines if "/kandinsky-jax " in line]
    assert len(runs) == 2
    quoted = " ".join(CALLS[command]).replace("a b", r"a\ b")
    assert f"kandinsky-jax {command} {quoted} --distributed" in runs[0]
    assert (rf"--command={CACHE}=gs://b/a\ b kandinsky/bin/" in runs[0]) == (command == "batch")
    assert set(re.findall(r"(?<!\S)--[a-z-]+", runs[0].split("kandinsky-jax")[1])) <= options_of(command)
    assert "delete" in lines[-1]


def test_the_script_gives_up_where_no_preemption_is_the_cause(tmp_path):
    done, lines = run_script(tmp_path, "ACTIVE\n" * 10, 100, "train", "prior", "gs://b/a.toml", TRIES="3")
    assert done.returncode == 1
    assert "ended early 3 times" in done.stderr
    assert sum("/kandinsky-jax " in line for line in lines) == 3
    assert "delete" in lines[-1]


@pytest.mark.parametrize("words", [(), ("gs://b/prompts.jsonl",)])
def test_the_script_says_how_it_is_called(tmp_path, words):
    done, lines = run_script(tmp_path, "", 1, *words)
    assert done.returncode == 2
    assert "queued_resources.sh train" in done.stdout
    assert "set -" not in done.stdout
    assert lines == []


def test_the_image_is_built_of_what_there_is():
    text = (PODS / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert 'ENTRYPOINT ["kandinsky-jax"]' in text
    assert set(re.search(r'"\.\[(.*?)\]"', text)[1].split(",")) == {"tpu", "batch", "train", "ray"}


TWO_HOSTS = """#!/usr/bin/env bash
case "$*" in
    *describe*) echo ACTIVE ;;
    *"tpu-vm ssh"*"pip install"*) : ;;
    *"tpu-vm ssh"*)
        last="${{!#}}"
        for i in 0 1; do
            KANDINSKY_JAX_PROCESS=$i bash -c "${{last#--command=}}" &
            hosts[$i]=$!
        done
        if ! [ -e codes ]; then
            steps() {{ cat out/metrics.jsonl 2>/dev/null | wc -l; }}
            until [ "$(steps)" -ge 3 ] || ! kill -0 "${{hosts[1]}}"; do {sleep} 0.1; done
            kill -TERM "${{hosts[1]}}"
        fi
        for host in "${{hosts[@]}}"; do code=0; wait "$host" || code=$?; echo "$code" >> codes; done
        exit "$code" ;;
esac
"""


@pytest.mark.campaign
def test_the_script_for_queued_resources_completes_a_training_after_one_host_had_to_stop(tmp_path):
    """With a stand-in for gcloud that runs the command in two processes; the first time, one of them gets SIGTERM."""
    make_pictures(tmp_path / "pictures")
    (tmp_path / "train.toml").write_text(
        'model = "tiny"\ndata = "pictures"\noutput = "out"\nresolution = 64\ntrain_batch_size = 8\n'
        "[optimizer]\nmax_train_steps = 60\n"
    )
    (tmp_path / "kandinsky" / "bin").mkdir(parents=True)
    program = tmp_path / "kandinsky" / "bin" / "kandinsky-jax"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kandinsky_jax.cli "$@"\n')
    (tmp_path / "gcloud").write_text(TWO_HOSTS.format(sleep=shutil.which("sleep")))
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for path in (program, tmp_path / "gcloud", tmp_path / "sleep"):
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PROJECT": "p",
        "ZONE": "z",
        "KANDINSKY_JAX_PROCESSES": "2",
        "KANDINSKY_JAX_COORDINATOR": f"localhost:{free_port()}",
    }
    done = subprocess.run(
        [PODS / "queued_resources.sh", "train", "lora-prior", "train.toml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "codes").read_text().split() == [str(STOPPED), str(STOPPED), "0", "0"]
    assert done.stderr.count("ended early; going on") == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 61))
    assert "stopped" in done.stdout


def make_pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("red")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def bash_blocks(heading: str) -> list[str]:
    """The bash blocks of a section of the guide for training."""
    section = (PODS / "training.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


@pytest.mark.campaign
def test_the_first_step_of_the_guide_for_training_runs_as_printed(tmp_path):
    installing, trying, stopping = bash_blocks("1. Try it here")
    assert installing == 'pip install -e ".[train]"\n'
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        ["bash", "-euc", trying + "echo ---\n" + stopping],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    expected = ["try/model", *["exit code 0"] * 2, *["checkpoints", "events", "layout.json", "metrics.jsonl", "model"]]
    expected += ["---", "stopped; start it again to continue: stopped.toml", *[f"exit code {STOPPED}"] * 2]
    expected += ["stopped/model", lines[-1]]
    # The processes' lines of Gloo run into each other, so they are no pattern to leave out.
    assert [line for line in lines if line in expected] == expected
    [metrics] = [json.loads(line) for line in lines if line.startswith("{")]
    assert metrics["step"] == 100
    assert re.match(r"100 100 losses", lines[-1])
    assert float(lines[-1].split()[-1]) < 1e-5
    assert (tmp_path / "try" / "model" / "pytorch_lora_weights.safetensors").exists()


def test_the_tars_of_the_guide_hold_the_pairs_alone(tmp_path):
    make_pictures(tmp_path / "pictures")
    for number in range(1100):
        (tmp_path / "pictures" / f"more.{number}.JPG").write_bytes(b"a picture")
        (tmp_path / "pictures" / f"more.{number}.txt").write_text("more")
    for stray in ("0.bak", "alone.txt", "alone.png.part", "lonely.png", ".DS_Store"):
        (tmp_path / "pictures" / stray).write_bytes(b"")
    [writing] = [block for block in bash_blocks("5. Weights and data") if "tarfile" in block]
    done = subprocess.run(["bash", "-euc", writing], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1108 pairs\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["000000.tar", "000001.tar"]
    found = listing(tmp_path / "data")
    assert len(found) == 1108
    assert not found.skipped.count
    assert [item.text for item in found].count("red") == 8


def test_the_guide_links_the_newest_tables_of_programs():
    newest = max((ROOT / "tpu_scripts" / "results").glob("aot-train-*.md"))
    assert f"(../results/{newest.name})" in (PODS / "training.md").read_text()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["lora-decoder", "wrong.toml"], 1),
        (["lora-decoder", "wrong.toml", "--nothing"], 2),
        (["lora-dekoder", "wrong.toml"], 2),
    ],
)
def test_mistakes_end_with_the_codes_of_the_guide(tmp_path, words, code):
    (tmp_path / "wrong.toml").write_text("resolutoin = 64\n")
    command = [sys.executable, "-m", "kandinsky_jax.cli", "train", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert (done.stderr.startswith("error: ")) == (code == 1)
    assert f"\n| {code} |" in (PODS / "training.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu(tmp_path):
    notebook = json.loads((ROOT / "tpu_scripts" / "kandinsky_colab.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))
    (tmp_path / "cells.py").write_text(code + "\nassert len(drawn) == 4 and report.complete\nprint(sheet.size)\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", "cells.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "(256, 64)"
    shutil.rmtree(tmp_path / "pictures")
