"""Check the SkyPilot file, the guide's commands and the JobSets by the programs and the schema that others publish.

    nox --session pods                                # installs SkyPilot and XPK, half a gigabyte
    nox --session pods -- --jobset-crd FILE           # JobSet's whole schema as well, of 0.8 MB; from
    # https://raw.githubusercontent.com/kubernetes-sigs/jobset/v0.12.0/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml

Each check has to refuse a broken copy too. Nothing here asks a cloud. The result goes to
tpu_scripts/results/pods-published-DATE.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonschema
import yaml

PODS = Path(__file__).parent
RESULTS = PODS.parent / "results"
STOPPED, FAILED = 143, 1  # exit codes of a training that wrote a checkpoint, and of one that lost a host
PROGRAM = """#!{python}
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print("started", flush=True)
time.sleep(60)
"""


def check_skypilot() -> dict[str, object]:
    """Read the file as SkyPilot does, and broken copies of it."""
    import sky

    task = sky.Task.from_yaml(str(PODS / "train_skypilot.yaml"))
    [resources] = task.resources
    assert resources.use_spot
    assert resources.accelerators == {"tpu-v5litepod-16": 1}
    assert resources.job_recovery["recover_on_exit_codes"] == [STOPPED]
    text = (PODS / "train_skypilot.yaml").read_text()
    refused = 0
    for good, bad in (
        ("run:", "runs:"),
        ("use_spot: true", "use_spot: often"),
        ("recover_on_exit_codes: [143]", "recover_on_exit_codes: [1430]"),
        ("max_restarts_on_errors: 20", "max_restarts_on_errors: -1"),
        ("infra: gcp", "infra: aws"),
        ("envs:", "envz:"),
    ):
        assert good in text, good
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as broken:
            broken.write(text.replace(good, bad))
            broken.flush()
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    sky.Task.from_yaml(broken.name)
            except (ValueError, AssertionError, TypeError):
                refused += 1
            else:
                raise AssertionError(f"SkyPilot takes {bad!r}")
    return {
        "version": importlib.metadata.version("skypilot"),
        "commands of the guide": check_sky_commands(),
        "broken copies refused": refused,
    }


def guide_commands(start: str) -> list[list[str]]:
    """Find the commands of the guide that start so, as words, with values for their variables."""
    text = (PODS / "training.md").read_text().replace("\\\n", " ")
    values = {"PROJECT": "project", "ZONE": "us-west4-a", "REGISTRY": "registry", "BUCKET": "bucket"}
    commands = [part for line in text.splitlines() for part in line.split(" && ") if part.startswith(start)]
    return [shlex.split(re.sub(r"\$(\w+)", lambda found: values[found[1]], command)) for command in commands]


def check_sky_commands() -> int:
    """Check that SkyPilot knows the guide's subcommands and options, and return how many commands these are."""
    commands = guide_commands("sky ")
    for words in commands:
        done = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, check=True)
        known = set(re.findall(r"(?<!\S)--?[a-z-]+", done.stdout))
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, words
    return len(commands)


def check_xpk() -> dict[str, object]:
    """Let XPK make the manifest of the guide's command, and run the shell that it puts around the program."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.yaml"
        commands = guide_commands("xpk ")
        for words in commands:
            made_here = [f"--output-manifest-file={made}"] if words[1:3] == ["workload", "create"] else []
            run_quietly([*words, "--dry-run", "--skip-validation", *made_here])
        job_set = yaml.safe_load(made.read_text())
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    [rule] = job_set["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    [policy] = job["podFailurePolicy"]["rules"]
    assert (policy["action"], policy["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {STOPPED, FAILED} <= set(policy["onExitCodes"]["values"])  # for all others XPK gives up
    shell, flag, script = pod["containers"][0]["command"]
    seconds = [exit_after_sigterm([shell, flag, script], delay) for delay in (0.0, 1.5, 3.0, 4.5)]
    return {
        "version": importlib.metadata.version("xpk"),
        "commands of the guide": len(commands),
        "seconds from SIGTERM to the exit with 143": seconds,
    }


def run_quietly(words: list[str]) -> None:
    """Run a command; its output counts where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def exit_after_sigterm(command: list[str], delay: float) -> float:
    """Run a shell with a stand-in for the program, send it SIGTERM, and check that the program's code comes back.

    Args:
        command: the shell's.
        delay: seconds from the program's start to the signal.
    Returns:
        seconds from the signal to the end of the shell; the program ends at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kandinsky-jax"
        program.write_text(PROGRAM.format(python=sys.executable, code=STOPPED))
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            while "started" not in running.stdout.readline():
                assert running.poll() is None
            time.sleep(delay)
            start = time.monotonic()
            running.send_signal(signal.SIGTERM)
            running.communicate(timeout=50)
            assert running.returncode == STOPPED, running.returncode
            return round(time.monotonic() - start, 1)


def check_jobset(path: Path) -> dict[str, object]:
    """Check the JobSets by JobSet's custom resource definition."""
    [version] = yaml.safe_load(path.read_text())["spec"]["versions"]
    validator = jsonschema.Draft202012Validator(version["schema"]["openAPIV3Schema"])
    names = sorted(found.name for found in PODS.glob("*jobset*.yaml"))
    for name in names:
        text = (PODS / name).read_text()
        validator.validate(yaml.safe_load(text))
        for good, bad in (("completions: ", "completions: x"), ("kind: JobSet", "kind: 1")):
            assert good in text
            assert list(validator.iter_errors(yaml.safe_load(text.replace(good, bad, 1)))), bad
    broken = yaml.safe_load((PODS / "train_jobset.yaml").read_text())
    broken["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    assert list(validator.iter_errors(broken))
    return {"file": path.name, "manifests": names}


def main() -> None:
    """Run all checks and write the result."""
    parser = argparse.ArgumentParser(description="Check the files for pods by what others publish.")
    parser.add_argument("--jobset-crd", type=Path, help="JobSet's custom resource definition.")
    crd = parser.parse_args().jobset_crd
    found = {"date": datetime.date.today().isoformat(), "skypilot": check_skypilot(), "xpk": check_xpk()}
    if crd is not None:
        found["jobset"] = check_jobset(crd)
    path = RESULTS / f"pods-published-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
