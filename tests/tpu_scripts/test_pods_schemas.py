"""Manifests for pods against the published schemas of Kubernetes, JobSet and KubeRay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tpu_scripts.pods_schemas import faults

PODS = Path(__file__).parents[2] / "tpu_scripts" / "pods"
MANIFESTS = sorted(path.name for path in PODS.glob("*.yaml") if "apiVersion:" in path.read_text())


def test_all_manifests_are_found():
    assert len(MANIFESTS) == 6


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_no_fault(name):
    assert faults(yaml.safe_load((PODS / name).read_text())) == []


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")
BROKEN: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("apiVersion",), "jobset.x-k8s.io/v1", "apiVersion"),
    (("spec", "failurePolicy", "maxRestart"), 3, "maxRestart"),
    (("spec", "failurePolicy", "maxRestarts"), "3", "is not of type 'integer'"),
    (("spec", "failurePolicy", "rules", 0, "action"), "Restart", "is not one of"),
    (("spec", "failurePolicy", "rules", 0, "onExitCodes"), [143], "onExitCodes"),
    (("spec", "replicatedJobs", 0, "replica"), 2, "replica"),
    (("spec", "replicatedJobs", 0, "replicas"), "two", "is not of type 'integer'"),
    ((*JOB, "completion"), 4, "completion"),
    ((*JOB, "completions"), "four", "is not of type 'integer'"),
    ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), ["143"], "is not of type 'integer'"),
    ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "operator"), None, "operator"),
    ((*JOB, "podFailurePolicy", "rules", 1, "onPodCondition"), [], "onPodCondition"),
    ((*POD, "terminationGracePeriod"), 30, "terminationGracePeriod"),
    ((*POD, "nodeSelector", "cloud.google.com/gke-spot"), True, "is not of type 'string'"),
    ((*POD, "containers", 0, "arg"), ["train"], "arg"),
    ((*POD, "containers", 0, "args"), "train", "is not of type 'array'"),
    ((*POD, "containers", 0, "ports", 0, "containerPort"), None, "containerPort"),
    ((*POD, "containers", 0, "name"), None, "name"),
]


WORKERS = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
BROKEN_RAY_JOB: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("apiVersion",), "ray.io/v1alpha1", "apiVersion"),
    (("spec", "entryPoint"), "kandinsky-jax batch", "entryPoint"),
    (("spec", "backoffLimit"), "3", "is not of type 'integer'"),
    (("spec", "submitterConfig", "backoffLimits"), 3, "backoffLimits"),
    (("spec", "shutdownAfterJobFinishes"), "true", "is not of type 'boolean'"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "is not one of"),
    (("spec", "rayClusterSpec", "rayVersion"), 2.6, "is not of type 'string'"),
    (("spec", "rayClusterSpec", "workerGroupSpec"), [], "workerGroupSpec"),
    (HEAD, None, "'headGroupSpec' is a required property"),
    ((*HEAD, "rayStartParams", "num-cpus"), 0, "is not of type 'string'"),
    ((*HEAD, "template", "spec", "containers", 0, "port"), [], "port"),
    ((*WORKERS, "numOfHost"), 1, "numOfHost"),
    ((*WORKERS, "minReplicas"), "0", "is not of type 'integer'"),
    ((*WORKERS, "groupName"), None, "'groupName' is a required property"),
    ((*WORKERS, "template", "spec", "terminationGracePeriod"), 15, "terminationGracePeriod"),
    ((*WORKERS, "template", "spec", "nodeSelector", "cloud.google.com/gke-spot"), True, "is not of type 'string'"),
]


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [("train_jobset.yaml", *broken) for broken in BROKEN] + [("ray_job.yaml", *broken) for broken in BROKEN_RAY_JOB],
    ids=lambda x: str(x[-1]) if isinstance(x, tuple) else "",
)
def test_a_broken_manifest_is_refused(name, place, value, said):
    """Set one field of a valid manifest, or remove it."""
    manifest = yaml.safe_load((PODS / name).read_text())
    broken: Any = copy.deepcopy(manifest)
    *path, last = place
    part = broken
    for step in path:
        part = part[step]
    if value is None:
        del part[last]
    else:
        part[last] = value
    [fault] = faults(broken)
    assert said in fault
