"""Faults of a Kubernetes or JobSet manifest, by the published schemas."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.36"  # which JobSet 0.12 refers to
JOBSET = json.loads((Path(__file__).parent / "jobset_openapi.json").read_text())["definitions"]
CHOICES = re.compile(r"Valid values are ([^.]*)\.")  # which the schema states in its descriptions alone


def faults(manifest: dict) -> list[str]:
    """List what is wrong with a Job or a JobSet, one line each; unknown fields are wrong."""
    if manifest["kind"] == "JobSet":
        return _jobset_faults(manifest)
    return _kubernetes_faults(manifest)


def _kubernetes_faults(manifest: dict) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _jobset_faults(manifest: dict) -> list[str]:
    schema = {"definitions": _closed(JOBSET), "$ref": "#/definitions/jobset.v1alpha2.JobSet"}
    validator = jsonschema.Draft202012Validator(schema)
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
    if manifest["apiVersion"] != "jobset.x-k8s.io/v1alpha2":
        found.append(f"apiVersion: {manifest['apiVersion']}")
    if found:
        return found
    for job in manifest["spec"]["replicatedJobs"]:
        metadata = manifest["metadata"] | job["template"].get("metadata", {})
        found += _kubernetes_faults(
            {"apiVersion": "batch/v1", "kind": "Job"} | job["template"] | {"metadata": metadata}
        )
    return found


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
