"""LoRA files and the fast adapter in the server: requests with other weights wait, and each gets its own."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kandinsky_jax as kj
from kandinsky_jax.checkpoint import flat_params, lora_files
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel, find_loras
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from kandinsky_jax.serve.tickets import Failed
from tests.pipelines.test_adapters import random_changes

STEPS = {"num_inference_steps": 8, "prior_num_inference_steps": 5}
DAMAGED = b"\x08" + bytes(7) + b"{nothing"
TOLERANCE = 1  # level: pictures are rounded


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with three LoRA files, and a link that leaves it."""
    root = tmp_path_factory.mktemp("loras")
    pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
    for i, name in enumerate(("style", "other")):
        parts = {"unet": random_changes(pipe.unet, i), "prior": random_changes(pipe.prior_prior, i + 5)}
        lora_files.write(root, parts, f"{name}.safetensors")
    shutil.copy(root / "style.safetensors", root / "damaged.safetensors")  # once the server has started
    (root / "notes.txt").write_text("no LoRA")
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(root / "style.safetensors", outside / "linked.safetensors")
    (root / "linked.safetensors").symlink_to(outside / "linked.safetensors")
    return root


@pytest.fixture(scope="module")
def service(folder) -> Iterator[Service]:
    service = Service(
        ServedModel.load("tiny", modes=["generate"], lora_folder=folder), ServerSettings(batch_sizes=(2,))
    )
    service.start()
    yield service
    service.stop()


def by_pipeline(request: ImageRequest, folder: Path) -> np.ndarray:
    """Generate a complete request by a pipeline of its own."""
    pipe: Any = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    for name in request.loras:
        pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
    if request.loras:
        pipe.set_adapters(list(request.loras), list(request.loras.values()))
    if request.fast:
        pipe.load_fast()
    [image] = pipe(
        request.prompt,
        height=64,
        width=64,
        generator=request.seed,
        num_inference_steps=request.num_inference_steps,
        prior_num_inference_steps=request.prior_num_inference_steps,
        guidance_scale=request.guidance_scale,
        prior_guidance_scale=request.prior_guidance_scale,
    ).images
    return np.asarray(image, int)


def test_a_server_that_stops_leaves_the_weights_as_it_found_them():
    service = Service(ServedModel.load("tiny", modes=["generate"]), ServerSettings(batch_sizes=(2,)))
    unet = service.model.pipe("generate").unet
    before = {name: np.asarray(leaf) for name, leaf in flat_params(unet).items()}
    service.start()
    assert service.submit(ImageRequest(prompt="purple heart", fast=True)).result(120)
    assert not all(np.array_equal(before[name], leaf) for name, leaf in flat_params(unet).items())
    service.stop()
    assert all(np.array_equal(before[name], leaf) for name, leaf in flat_params(unet).items())


def test_requests_with_other_weights_do_not_wait_for_each_other():
    """One that is not compiled yet, before one of which only a part has begun."""
    service = Service(ServedModel.load("tiny", modes=["generate"]), ServerSettings(batch_sizes=(1,)))
    compiled: set[str] = {"plain"}
    service._engine.is_compiled = lambda plan, *_: ("fast" if plan.request.fast else "plain") in compiled
    service._thread.start()
    fast = service.submit(ImageRequest(prompt="purple heart", fast=True))
    plain = service.submit(ImageRequest(prompt="purple heart", num_images=6, **STEPS))
    while service.state.running == 0:
        time.sleep(0.01)
    compiled.add("fast")
    assert len(plain.result(120)) == 6
    assert fast.result(120)
    service.stop()


def test_a_folders_files_have_names_and_links_that_leave_it_do_not(folder):
    assert sorted(find_loras(folder)) == ["damaged", "other", "style"]
    with pytest.raises(ValueError, match="is not a folder"):
        find_loras(folder / "none")


def test_a_file_that_is_damaged_at_the_start_is_left_out(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(DAMAGED)
    with pytest.warns(UserWarning, match=r"a LoRA file is left out: .*damaged\.safetensors"):
        assert find_loras(tmp_path) == {}


@pytest.mark.slow
def test_each_request_gets_its_own_weights(service, folder):
    before = {name: np.asarray(leaf) for name, leaf in flat_params(service.model.pipe("generate").unet).items()}
    requests = [
        ImageRequest(prompt="purple heart", seed=1, **STEPS),
        ImageRequest(prompt="purple heart", seed=1, loras={"style": 0.7}, **STEPS),
        ImageRequest(prompt="purple heart", seed=1, loras={"style": 0.4, "other": -0.3}, **STEPS),
        ImageRequest(prompt="purple heart", seed=1, fast=True),
        ImageRequest(prompt="purple heart", seed=1, fast=True, loras={"other": 0.5}),
        ImageRequest(prompt="purple heart", seed=1, **STEPS),
    ]
    tickets = [service.submit(request) for request in requests]
    pictures = [np.asarray(ticket.result(120)[0].picture, int) for ticket in tickets]
    assert np.array_equal(pictures[0], pictures[-1])
    for ticket, picture in zip(tickets[:-1], pictures, strict=False):
        assert np.abs(picture - by_pipeline(ticket.request, folder)).max() <= TOLERANCE, ticket.request
    assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(pictures[:5]) for b in pictures[:i])
    # One that is submitted while the weights of a fast one are still there.
    assert service.submit(tickets[3].request).result(60)
    assert np.array_equal(pictures[0], np.asarray(service.submit(requests[0]).result(60)[0].picture))
    assert tickets[3].request.num_inference_steps == 4
    assert tickets[3].request.scheduler == "tcd"
    assert service.submit(ImageRequest(prompt="purple heart", seed=1, **STEPS)).result(60)
    after = flat_params(service.model.pipe("generate").unet)
    assert all(np.array_equal(before[name], leaf) for name, leaf in after.items())


@pytest.mark.filterwarnings("ignore:LoRA of a request cannot be used:UserWarning")
def test_a_damaged_file_fails_its_request_alone(service, folder):
    (folder / "damaged.safetensors").write_bytes(DAMAGED)
    bad = service.submit(ImageRequest(prompt="purple heart", loras={"damaged": 1.0}, **STEPS))
    good = service.submit(ImageRequest(prompt="purple heart", seed=2, **STEPS))
    assert good.result(60)
    assert isinstance(bad.end, Failed)
    with pytest.raises(RequestError, match="the LoRA 'damaged' cannot be used") as raised:
        bad.result(1)
    assert "/" not in str(raised.value), "no path of the server"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LoRA of a request cannot be used:UserWarning")
def test_a_file_that_fails_leaves_nothing_of_the_one_before(service, folder):
    plain = ImageRequest(prompt="purple heart", seed=2, **STEPS)
    before = np.asarray(service.submit(plain).result(120)[0].picture)
    styled = service.submit(dataclasses.replace(plain, loras={"style": 1.0})).result(120)[0].picture
    assert not np.array_equal(before, styled)
    (folder / "damaged.safetensors").write_bytes(DAMAGED)
    bad = service.submit(dataclasses.replace(plain, loras={"damaged": 1.0}))
    with pytest.raises(RequestError, match="cannot be used"):
        bad.result(60)
    assert np.array_equal(before, service.submit(plain).result(120)[0].picture)
