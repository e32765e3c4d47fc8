"""Compares one network with its PyTorch twin at the official size, and prints one line of JSON: what it measured.

    python -m tests.models.full_size_worker NETWORK FOLDER

The twin gets random weights, writes them as diffusers or transformers do, computes its outputs and is freed; then our
network is read from FOLDER as a user's would be. Inputs are made once, in our layout.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import transformers

from kandinsky_jax import models
from kandinsky_jax.checkpoint import load_network
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from tests.conftest import nchw, official_config, worst

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
Call = Callable[..., Any]  # a method of our network, jitted


@dataclasses.dataclass(frozen=True)
class Case:
    """One network. `reference` and `ours` give their outputs under the same names."""

    repository: str
    component: str
    build: Callable[[dict], torch.nn.Module]
    cls: type
    inputs: Callable[[np.random.Generator], Arrays]
    reference: Callable[[Any, Tensors], Tensors]
    ours: Callable[[Call, Arrays], dict[str, Any]]
    spread: float = 0.1  # of biases and norms


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def unet_inputs(rng: np.random.Generator, channels: int, hint: bool = False) -> Arrays:
    # An embedding so small that the epsilon of the norm after its projection matters.
    inputs = {"sample": normal(rng, 1, 64, 64, channels), "image_embeds": 0.3 * normal(rng, 1, 1280)}
    if hint:
        inputs["hint"] = rng.random((1, 512, 512, 3), np.float32)
    return inputs | {"timestep": np.array([731])}


def unet_reference(model: Any, x: Tensors) -> Tensors:
    condition = {name: x[name] for name in ("image_embeds", "hint") if name in x}
    return {"": model(x["sample"], x["timestep"], None, added_cond_kwargs=condition).sample}


def unet_ours(call: Call, x: Arrays) -> dict[str, Any]:
    condition = call(x["image_embeds"], x.get("hint"), method="condition")
    return {"": call(x["sample"], x["timestep"], condition)}


def prior_inputs(rng: np.random.Generator) -> Arrays:
    return {
        "hidden_states": normal(rng, 2, 1280),
        "timestep": np.array([17, 731]),
        "proj_embedding": normal(rng, 2, 1280),
        "encoder_hidden_states": normal(rng, 2, 77, 1280),
        "attention_mask": np.arange(77) < [[5], [40]],  # the rest is padding
    }


def prior_reference(model: Any, x: Tensors) -> Tensors:
    predicted = model(**x).predicted_image_embedding
    return {"": predicted, "post_process_latents": model.post_process_latents(predicted)}


def prior_ours(call: Call, x: Arrays) -> dict[str, Any]:
    text = (x["proj_embedding"], x["encoder_hidden_states"], x["attention_mask"])
    predicted = call(x["hidden_states"], x["timestep"], call(*text, method="condition"))
    return {"": predicted, "post_process_latents": call(predicted, method="post_process_latents")}


def movq_inputs(rng: np.random.Generator) -> Arrays:
    return {"pixels": 2 * rng.random((1, 128, 192, 3), np.float32) - 1, "latents": 0.5 * normal(rng, 1, 16, 24, 4)}


def movq_reference(model: Any, x: Tensors) -> Tensors:
    return {
        "encode": model.encode(x["pixels"]).latents,
        "decode": model.decode(x["latents"], force_not_quantize=True).sample,
    }


def movq_ours(call: Call, x: Arrays) -> dict[str, Any]:
    return {"encode": call(x["pixels"], method="encode"), "decode": call(x["latents"], method="decode")}


def text_inputs(rng: np.random.Generator) -> Arrays:
    start, end = 49406, 49407
    ids = np.zeros((2, 77), np.int64)
    for row, (words, padding) in zip(ids, ((12, 0), (40, end)), strict=True):
        row[: words + 2] = [start, *rng.integers(300, start, words), end]
        row[words + 2 :] = padding
    return {"input_ids": ids}


def text_reference(model: Any, x: Tensors) -> Tensors:
    output = model(x["input_ids"])
    return {"text_embeds": output.text_embeds, "last_hidden_state": output.last_hidden_state}


def unet_case(repository: str, channels: int, hint: bool = False) -> Case:
    return Case(
        repository,
        "unet",
        diffusers.UNet2DConditionModel.from_config,
        models.UNet2DConditionModel,
        partial(unet_inputs, channels=channels, hint=hint),
        unet_reference,
        unet_ours,
    )


CASES = {
    "unet_decoder": unet_case("kandinsky-2-2-decoder", 4),
    "unet_inpaint": unet_case("kandinsky-2-2-decoder-inpaint", 9),
    "unet_controlnet_depth": unet_case("kandinsky-2-2-controlnet-depth", 4, hint=True),
    "prior": Case(
        "kandinsky-2-2-prior",
        "prior",
        diffusers.PriorTransformer.from_config,
        models.PriorTransformer,
        prior_inputs,
        prior_reference,
        prior_ours,
    ),
    "movq": Case(
        "kandinsky-2-2-decoder",
        "movq",
        diffusers.VQModel.from_config,
        models.VQModel,
        movq_inputs,
        movq_reference,
        movq_ours,
        # With the others' 0.1, PyTorch's own rounding in the decoder (against float64) comes near the tolerance;
        # so it does with latents of the usual size.
        spread=0.2,
    ),
    "text_encoder": Case(
        "kandinsky-2-2-prior",
        "text_encoder",
        lambda raw: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**raw)),
        models.CLIPTextModelWithProjection,
        text_inputs,
        text_reference,
        lambda call, x: call(x["input_ids"])._asdict(),
    ),
    "image_encoder": Case(
        "kandinsky-2-2-prior",
        "image_encoder",
        lambda raw: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**raw)),
        models.CLIPVisionModelWithProjection,
        lambda rng: {"pixel_values": normal(rng, 1, 224, 224, 3)},
        lambda model, x: {"": model(x["pixel_values"]).image_embeds},
        lambda call, x: {"": call(x["pixel_values"])},
    ),
}


QUERIES_AND_KEYS = re.compile(r"\.(to_[qk]|[qk]_proj|add_k_proj)\.weight$")


class RandomPool:
    """Normal numbers that are used again after 17 million: billions of new ones would take half a minute."""

    def __init__(self) -> None:
        prime = (1 << 24) + 43  # no width of a matrix divides it
        self.numbers = torch.randn(prime, generator=torch.Generator().manual_seed(0))
        self.next = 0

    def take(self, shape: torch.Size) -> torch.Tensor:
        """The next numbers, float32 of this shape."""
        count, parts = shape.numel(), []
        while count > 0:
            part = self.numbers[self.next : self.next + count]
            count -= len(part)
            self.next = (self.next + len(part)) % len(self.numbers)
            parts.append(part)
        return torch.cat(parts).view(shape)


def draw(name: str, shape: torch.Size, spread: float, pool: RandomPool) -> torch.Tensor:
    """A random parameter with which a mistake anywhere shows; `spread` is of vectors.

    PyTorch's own initialisers leave biases at 0 and norms at 1, and queries and keys so small that attention hardly
    tells one token from another. Here nothing is 0 or 1, queries and keys keep the variance of what they are made
    from, and the other matrices make it so small that the norms' epsilons matter.
    """
    values = pool.take(shape)
    if len(shape) > 1 and shape[0] > 1:
        gain = 1.0 if QUERIES_AND_KEYS.search(name) else 0.3
        return values.mul_(gain * shape[1:].numel() ** -0.5)
    # A spatial norm's scale is read off the latents by conv_y: its bias is what a norm's weight is elsewhere.
    is_scale = name.endswith((".weight", ".conv_y.bias"))
    return values.mul_(spread).add_(1.0 if is_scale else 0.0)


def twin(case: Case) -> torch.nn.Module:
    """The PyTorch model, without the minute that its own initialisers would take."""
    with accelerate.init_empty_weights():  # leaves buffers alone: masks, positions
        model = case.build(official_config(case.repository, case.component))
    pool = RandomPool()
    weights = {name: draw(name, p.shape, case.spread, pool) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(nchw(array) if array.ndim == 4 else array))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor.numpy()


def reference_outputs(case: Case, inputs: Arrays, folder: Path) -> Arrays:
    """Writes the twin's folder as it goes; the twin is gone when this returns."""
    model = twin(case)
    model.save_pretrained(folder)
    with torch.inference_mode():
        outputs = case.reference(model, {name: as_tensor(array) for name, array in inputs.items()})
    return {name: as_array(tensor).copy() for name, tensor in outputs.items()}


def our_outputs(case: Case, inputs: Arrays, folder: Path) -> Arrays:
    network, params = Network.split(load_network(case.cls, folder, "float32"))
    outputs = case.ours(partial(call, network, params), inputs)
    return {name: np.asarray(output) for name, output in outputs.items()}


def measure(case: Case, folder: Path) -> Iterator[tuple[str, Any]]:
    """What the line of JSON holds."""
    inputs = case.inputs(np.random.default_rng(0))
    began = time.perf_counter()
    reference = reference_outputs(case, inputs, folder)
    gc.collect()
    yield "reference_seconds", round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    ours = our_outputs(case, inputs, folder)
    yield "our_seconds", round(time.perf_counter() - began, 1)
    assert ours.keys() == reference.keys()
    yield "worst", {name: float(f"{worst(ours[name], reference[name]):.2g}") for name in reference}
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux's unit
    yield "peak_gib", round(kib / 2**20, 1)


if __name__ == "__main__":
    _, name, folder = sys.argv
    print(json.dumps({"network": name, **dict(measure(CASES[name], Path(folder)))}))
