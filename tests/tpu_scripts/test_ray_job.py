"""The manifest for KubeRay is consistent with itself, the program, the image and the other manifests."""

from __future__ import annotations

import re
import shlex
import tomllib

import typer.main
from packaging.requirements import Requirement

from kandinsky_jax.cli import app
from tests.tpu_scripts.test_pods import PODS, ROOT, SLICES, SPOT_SECONDS, job_of, manifest


def ray_groups(spec: dict) -> tuple[dict, dict]:
    """The head and the only group of workers of a RayJob."""
    cluster = spec["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def test_the_command_of_the_ray_job_parses_and_asks_for_what_its_workers_have():
    spec = manifest("ray_job.yaml")["spec"]
    program, command, *arguments = shlex.split(spec["entrypoint"])
    assert program == "kandinsky-jax"
    given = typer.main.get_command(app).commands[command].make_context(command, arguments).params
    assert (given["engine"], given["address"], given["quiet"]) == ("ray", "auto", False)
    _, workers = ray_groups(spec)
    pod = workers["template"]["spec"]
    selector = pod["nodeSelector"]
    place = (selector["cloud.google.com/gke-tpu-accelerator"], selector["cloud.google.com/gke-tpu-topology"])
    chips, hosts = SLICES[place]
    assert hosts == workers["numOfHosts"] == 1
    assert given["resources"] == [f"TPU={chips}"]  # by which name KubeRay hands google.com/tpu to Ray
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert pod["terminationGracePeriodSeconds"] <= SPOT_SECONDS


def test_pods_of_the_ray_job_have_one_image_and_the_models_and_the_head_takes_no_work():
    head, workers = ray_groups(manifest("ray_job.yaml")["spec"])
    pods = [group["template"]["spec"] for group in (head, workers)]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert [container["volumeMounts"] for container in containers] == [
        [{"name": "models", "mountPath": "/models", "readOnly": True}]
    ] * 2
    assert pods[0]["volumes"] == pods[1]["volumes"]
    assert all("command" not in container and "args" not in container for container in containers)  # KubeRay's own
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert "nodeSelector" not in pods[0]
    assert "google.com/tpu" not in containers[0]["resources"]["limits"]
    static = job_of(manifest("indexed_job.yaml"))["template"]["spec"]
    assert pods[1]["nodeSelector"] == static["nodeSelector"]
    assert pods[1]["volumes"][0] in static["volumes"]


def test_ray_is_of_one_version_in_the_image_and_the_manifest():
    version = manifest("ray_job.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f'"ray[default]=={version}"' in (PODS / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [ray] = [Requirement(text) for text in project["optional-dependencies"]["ray"]]
    assert ray.name == "ray"
    assert ray.specifier.contains(version)


def test_the_ray_job_is_private_starts_again_and_leaves_no_cluster():
    """By rules of KubeRay's operator that its schema does not state, too."""
    found = manifest("ray_job.yaml")
    spec = found["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # for tokens
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"  # which alone has a submitter that outlives the head
    assert 0 < spec["backoffLimit"] <= spec["submitterConfig"]["backoffLimit"]
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", found["metadata"]["name"])
