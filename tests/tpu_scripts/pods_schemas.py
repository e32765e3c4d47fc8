"""Faults of a manifest for Kubernetes, JobSet or KubeRay, by the published schemas."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.36"  # which JobSet 0.12 refers to
FOLDER = Path(__file__).parent
JOBSET = json.loads((FOLDER / "jobset_openapi.json").read_text())["definitions"]
RAY_JOB = json.loads((FOLDER / "kuberay_openapi.json").read_text())
CHOICES = re.compile(r"Valid values are ([^.]*)\.")  # which the schema states in its descriptions alone


def faults(manifest: dict) -> list[str]:
    """List what is wrong with a Job, a JobSet or a RayJob, one line each; unknown fields are wrong."""
    if manifest["kind"] == "JobSet":
        return _jobset_faults(manifest)
    if manifest["kind"] == "RayJob":
        return _ray_job_faults(manifest)
    return _kubernetes_faults(manifest)


def _kubernetes_faults(manifest: dict) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _jobset_faults(manifest: dict) -> list[str]:
    schema = {"definitions": _closed(JOBSET), "$ref": "#/definitions/jobset.v1alpha2.JobSet"}
    found = _schema_faults(schema, manifest, "jobset.x-k8s.io/v1alpha2")
    if found:
        return found
    for job in manifest["spec"]["replicatedJobs"]:
        metadata = manifest["metadata"] | job["template"].get("metadata", {})
        found += _kubernetes_faults(
            {"apiVersion": "batch/v1", "kind": "Job"} | job["template"] | {"metadata": metadata}
        )
    return found


def _ray_job_faults(manifest: dict) -> list[str]:
    found = _schema_faults(_without_unknown_fields(RAY_JOB), manifest, "ray.io/v1")
    if found:
        return found
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = {"template": group["template"]}
        found += _kubernetes_faults(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pod"}, "spec": spec}
        )
    return found


def _schema_faults(schema: dict[str, Any], manifest: dict, version: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
    if manifest["apiVersion"] != version:
        found.append(f"apiVersion: {manifest['apiVersion']}")
    return found


def _without_unknown_fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Admit the named properties only, at every depth of a schema."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: _without_unknown_fields(part) for name, part in schema["properties"].items()}
        closed["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        closed["items"] = _without_unknown_fields(schema["items"])
    return closed


def _closed(definitions: dict[str, Any]) -> dict[str, Any]:
    """Admit no unknown properties, and the stated values only; leave to Kubernetes' schemas what is theirs."""
    closed = copy.deepcopy(definitions)
    for definition in closed.values():
        definition["additionalProperties"] = False
        for part in definition["properties"].values():
            if choices := CHOICES.search(part.get("description", "")):
                part["enum"] = choices[1].split(", ")
            for place in (part, part.get("items", {})):
                if place.get("$ref", "").startswith("https:"):
                    del place["$ref"]
    return closed
