"""What int8 costs in quality and brings in bytes: the embedded model, and the tests' model of coloured shapes.

    python tpu_scripts/quantize/measure.py build/emoji/data [--shapes build/shapes]

quantizes both models, calibrated by eight of their own prompts, and measures: the error of an evaluation of each
network (rms of the difference, as a share of the spread) on other prompts; that of each layer, given the same
input; bytes of weights; the memory that loading a prior of the official shape takes, with random weights; and how many
pictures are right (see train_tiny/evaluate_fast.py and few_steps/shapes.py), with the same noise. `data` is what
train_tiny/pictures.py has written; --shapes the folder of few_steps/shapes.py, for its distilled adapters. `--only`
runs some parts; rates that are there already are not counted again. Writes tpu_scripts/results/int8-DATE.json after
each part, and a table beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tpu_scripts" / "train_tiny"), str(ROOT / "tpu_scripts" / "few_steps")]

import evaluate  # noqa: E402
import shapes as few_steps  # noqa: E402
from evaluate_fast import Judge  # noqa: E402

from kandinsky_jax import (  # noqa: E402
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
    scheduler_named,
)
from kandinsky_jax.checkpoint import flat_params, save_network, set_params  # noqa: E402
from kandinsky_jax.checkpoint.networks import bytes_as  # noqa: E402
from kandinsky_jax.checkpoint.quantization import quantize_network  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.diffusion import Network  # noqa: E402
from kandinsky_jax.diffusion.calls import call, condition  # noqa: E402
from kandinsky_jax.models.layers import abstract  # noqa: E402
from kandinsky_jax.models.quantization_config import QuantizationConfig  # noqa: E402
from kandinsky_jax.models.quantized import float_layers, layers_to_ignore, quantized_layers  # noqa: E402
from kandinsky_jax.models.structure import copy_structure, replace_module  # noqa: E402
from kandinsky_jax.pipelines.prior import _ARGUMENTS  # noqa: E402
from kandinsky_jax.pipelines.quantization import calibrate  # noqa: E402
from tests import shapes  # noqa: E402

NETWORKS = ("unet", "prior_prior", "movq")
CALIBRATION, TRIED = 8, 8  # prompts for calibration, and others for errors
TINY = {"num_inference_steps": 25, "guidance_scale": 2.0, "prior_guidance_scale": 1.0}
Ranges = dict[str, dict[str, tuple[float, float]]]


def load(model: str | Path) -> Any:
    """A combined pipeline in float32, without bars."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_networks(pipe: Any, networks: dict[str, nnx.Module]) -> Any:
    """A pipeline with other networks in the place of some."""
    new = type(pipe)(**pipe._held() | networks)
    new.set_progress_bar_config(disable=True)
    return new


# Errors -----------------------------------------------------------------------------------------------------------


def relative(ours: np.ndarray, full: np.ndarray) -> float:
    """The rms of a difference, as a share of the spread."""
    return float(np.sqrt(np.mean((ours - full) ** 2)) / np.std(full))


class Evaluation(NamedTuple):
    """One evaluation of a network: its method, arguments, and the arguments of `condition`, None for MoVQ."""

    method: str
    arguments: tuple[Any, ...]
    given: dict[str, Any] | None

    def run(self, network: nnx.Module) -> np.ndarray:
        """The network's output."""
        structure, params = Network.split(network)
        conditions = [] if self.given is None else [condition(structure, params, self.given)[0]]
        return np.asarray(call(structure, params, *self.arguments, *conditions, method=self.method), np.float32)


def evaluations(pipe: Any, prompts: Sequence[str], steps: int = 10) -> dict[str, list[Evaluation]]:
    """Evaluations of the networks on the way to pictures, without guidance."""
    found: dict[str, list[Evaluation]] = {name: [] for name in NETWORKS}
    prior, decoder, side = pipe.prior_pipe, pipe.decoder_pipe, pipe.decoder_pipe.native_side

    def noting(name: str, scheduler: Any, given: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        timesteps = scheduler.schedule(steps).timesteps

        def note(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
            x = np.asarray(tensors["latents"], np.float32)
            x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
            if step + 1 < steps:
                found[name].append(Evaluation("__call__", (x, np.full(len(x), timesteps[step + 1])), given))
            return {}

        return note

    usual = {"num_inference_steps": steps, "guidance_scale": 1.0, "generator": 0}
    text = dict(zip(_ARGUMENTS, prior._encode(list(prompts)), strict=True))
    embeds = prior(
        list(prompts), **usual, callback_on_step_end=noting("prior_prior", prior.scheduler, text)
    ).image_embeds
    note = noting("unet", decoder.scheduler, {"image_embeds": np.asarray(embeds)})
    size = {"height": side, "width": side, "output_type": "latent"}
    latents = decoder(embeds, embeds, **usual, **size, callback_on_step_end=note).images
    latents = np.asarray(latents, np.float32)
    latents = latents.transpose(0, 2, 3, 1) if latents.shape[1] == 4 else latents
    found["movq"] = [Evaluation("decode", (latents,), None)]
    return found


class Compared(nnx.Module):
    """Stands in a layer's place, and reports the squares of a quantized one's error and of its own spread."""

    def __init__(self, full: nnx.Module, quantized: nnx.Module, report: Callable[[np.ndarray], None]):
        self.full, self.quantized, self.report = full, quantized, report

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        y = self.full(x, **options)
        error = self.quantized(x, **options) - y
        jax.debug.callback(self.report, jnp.stack([jnp.mean(error**2), jnp.var(y)]))
        return y


def layer_errors(full: nnx.Module, quantized: nnx.Module, runs: Sequence[Evaluation]) -> dict[str, float]:
    """Error of each quantized layer with the input that it has in the full network, worst first."""
    both, made = copy_structure(full), dict(quantized_layers(quantized))
    sums: dict[str, np.ndarray] = {name: np.zeros(2) for name in made}
    for name, layer in list(float_layers(both)):
        if name in made:

            def report(value: np.ndarray, name: str = name) -> None:
                sums[name] += value

            replace_module(both, name, Compared(layer, made[name], report))
    for run in runs:
        run.run(both)
    jax.effects_barrier()
    errors = {name: float(np.sqrt(error / spread)) for name, (error, spread) in sums.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def errors(pipe: Any, ranges: Ranges, prompts: Sequence[str]) -> dict[str, Any]:
    """Errors of all networks, and of their worst layers."""
    found: dict[str, Any] = {}
    for name, runs in evaluations(pipe, prompts).items():
        full = getattr(pipe, name)
        outputs = [run.run(full) for run in runs]
        found[name] = {}
        variants = {
            "int8": quantize_network(full, ranges[name]),
            "int8, inputs scaled at run time": quantize_network(full, None),
            "float8_e4m3fn": quantize_network(full, ranges[name], "float8_e4m3fn"),
        }
        for variant, quantized in variants.items():
            shares = [relative(run.run(quantized), output) for run, output in zip(runs, outputs, strict=True)]
            found[name][variant] = {"mean": round(float(np.mean(shares)), 5), "worst": round(max(shares), 5)}
        each = layer_errors(full, variants["int8"], runs[:: max(1, len(runs) // 3)])
        found[name]["median layer"] = round(float(np.median(list(each.values()))), 5)
        found[name]["worst layers"] = {layer: round(error, 5) for layer, error in list(each.items())[:3]}
    return found


# Bytes ------------------------------------------------------------------------------------------------------------


def weight_bytes(network: nnx.Module, part: str = "") -> dict[str, Any]:
    """Bytes of a network's parameters whose names begin so, in bfloat16, full and quantized."""
    made = quantize_network(network, None)
    full, quantized = (
        bytes_as({name: leaf for name, leaf in flat_params(one).items() if name.startswith(part)}, jnp.bfloat16)
        for one in (network, made)
    )
    return {"bfloat16": full, "int8": quantized, "share": round(quantized / full, 4)}


def official(cls: type[nnx.Module], folder: str) -> dict[str, Any]:
    """The same for a network of the official shape, without arrays."""
    path = ROOT / "tests" / "official" / folder / "config.json"
    full: Any = abstract(cls, cls.CONFIG.from_dict(json.loads(path.read_text())))
    config = dataclasses.replace(full.config, quantization_config=QuantizationConfig(ignore=layers_to_ignore(full)))
    part = "decoder." if folder.endswith("movq") else ""
    sizes = {}
    for name, one in (("bfloat16", full), ("int8", abstract(cls, config))):
        params = {key: leaf for key, leaf in flat_params(one).items() if key.startswith(part)}
        sizes[name] = bytes_as(params, jnp.bfloat16)
    return sizes | {"share": round(sizes["int8"] / sizes["bfloat16"], 4)}


LOADING = """
import re, sys
from pathlib import Path
from kandinsky_jax import PriorTransformer, load_network

def kilobytes(name):  # what getrusage tells of a process begins with its parent's
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = kilobytes("VmRSS")
network = load_network(PriorTransformer, sys.argv[1], "bfloat16")
print((kilobytes("VmHWM") - before) * 1024)
"""


def memory() -> dict[str, int]:
    """Peak memory that loading adds to a process, for a prior of the official shape, bfloat16 and int8."""
    path = ROOT / "tests" / "official" / "kandinsky-2-2-prior" / "prior" / "config.json"
    config = PriorTransformer.CONFIG.from_dict(json.loads(path.read_text()))
    made = dataclasses.replace(
        config, quantization_config=QuantizationConfig(ignore=layers_to_ignore(abstract(PriorTransformer, config)))
    )
    found = {}
    for name, one in (("bfloat16", config), ("int8", made)):
        network = abstract(PriorTransformer, one)
        params = {}
        for key, leaf in flat_params(network).items():
            dtype = jnp.bfloat16 if leaf.dtype == jnp.float32 and not key.endswith("_scale") else leaf.dtype
            params[key] = np.ones(leaf.shape, dtype)
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
            save_network(set_params(network, params), folder)
            del params, network
            command = [sys.executable, "-c", LOADING, folder]
            found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    return found


# Pictures ---------------------------------------------------------------------------------------------------------


def emoji(arguments: argparse.Namespace, found: dict[str, Any], write: Callable[[], None]) -> None:
    """Measure the embedded model."""
    there = evaluate.known(arguments.data)
    rows = [(code, text) for code in evaluate.common(there, 500) for text in there.captions[code]]
    pipe, texts = load("tiny"), [text for _, text in rows]
    judge = Judge(pipe, there, rows)
    chosen = texts[:: len(texts) // (CALIBRATION + TRIED)]
    ranges = calibrate(pipe, chosen[:CALIBRATION])
    if "errors" in arguments.only:
        found["errors"] = errors(pipe, ranges, chosen[CALIBRATION : CALIBRATION + TRIED])
        parts = {"unet": "", "prior_prior": "", "movq": "decoder."}
        found["bytes"] = {name: weight_bytes(getattr(pipe, name), part) for name, part in parts.items()}
        print(json.dumps(found, indent=1), flush=True)
    if "rates" not in arguments.only:
        return

    def right(one: Any, **settings: Any) -> float:
        return round(float(judge.right(evaluate.generate(one, texts, **settings)[0]).mean()), 4)

    rates = found.setdefault("rates", {"names": len(rows), "25 + 25": {}, "4 + 4": {}})
    of_others = calibrate(pipe)
    variants: dict[str, Callable[[nnx.Module, str], nnx.Module]] = {
        "full": lambda network, name: network,
        "int8": lambda network, name: quantize_network(network, ranges[name]),
        "int8, default prompts": lambda network, name: quantize_network(network, of_others[name]),
        "int8, inputs scaled at run time": lambda network, name: quantize_network(network, None),
    }
    fast = load("tiny")
    settings = fast.load_fast()
    for variant, change in variants.items():
        for what, one, given in (("25 + 25", pipe, TINY), ("4 + 4", fast, settings)):
            if variant in rates[what]:
                continue
            made = with_networks(one, {name: change(getattr(one, name), name) for name in NETWORKS})
            made.scheduler = one.scheduler
            rates[what][variant] = right(made, **given)
            print(what, variant, rates[what][variant], flush=True)
            write()
    loaded = load("tiny")
    loaded.quantize(prompts=chosen[:CALIBRATION])
    rates["4 + 4"]["int8, LoRA loaded into it"] = right(loaded, **loaded.load_fast())


def coloured(arguments: argparse.Namespace, found: dict[str, Any], write: Callable[[], None]) -> None:
    """Measure the model of coloured shapes."""
    asked = shapes.captions(few_steps.COUNT, seed=few_steps.OTHER_SEED)
    others = [one.text for one in shapes.captions(CALIBRATION + TRIED, seed=few_steps.CHOICE_SEEDS[0])]
    pipe = load(few_steps.MODEL)
    size = {"height": shapes.SIDE, "width": shapes.SIDE}
    ranges = calibrate(pipe, others[:CALIBRATION], **size)
    if "errors" in arguments.only:
        found["errors"] = errors(pipe, ranges, others[CALIBRATION:])
        print(json.dumps(found, indent=1), flush=True)
    if "rates" not in arguments.only:
        return
    rates = found.setdefault("rates", {"captions": len(asked)})
    guided = few_steps.settings_of(25, 50, 4.0)

    def both(what: str, one: Any, ranges: Ranges, given: dict[str, Any]) -> None:
        made = {name: quantize_network(getattr(one, name), ranges[name]) for name in NETWORKS}
        for variant, pipe in (("full", one), ("int8", with_networks(one, made))):
            if variant not in rates.setdefault(what, {}):
                rates[what][variant] = few_steps.rates(pipe, asked, **given)
                print(what, variant, json.dumps(rates[what][variant]), flush=True)
                write()

    both("25 + 50", pipe, ranges, guided)
    few = few_steps.settings_of(4, 4, 1.0)
    fast = load(few_steps.MODEL)
    fast.scheduler = scheduler_named("tcd", fast.scheduler.config)
    both("4 + 4, not distilled", fast, calibrate(fast, others[:CALIBRATION], **size, **few), few)
    if arguments.shapes is None:
        return
    few_steps.load(fast, {name: arguments.shapes / name / "model" for name in ("distill-decoder", "distill-prior")})
    both("4 + 4", fast, calibrate(fast, others[:CALIBRATION], **size, **few), few)


# The table --------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share as percent."""
    return f"{100 * share:.2f} %"


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"# int8, {found['date']}", "", "Error of an evaluation: rms of the difference, share of the spread.", ""]
    lines += ["| model | network | " + " | ".join(("int8", "worst", "dynamic", "fp8", "median layer", "worst layer"))]
    lines[-1] += " |"
    lines += ["|---|---|" + "---:|" * 6]
    for model in ("tiny", "shapes"):
        for name, each in found.get(model, {}).get("errors", {}).items():
            int8, dynamic, float8 = (each[key] for key in list(each)[:3])
            layer, error = next(iter(each["worst layers"].items()))
            cells = [*map(percent, (int8["mean"], int8["worst"], dynamic["mean"], float8["mean"]))]
            cells += [percent(each["median layer"]), f"{percent(error)} `{layer}`"]
            lines.append(f"| {model} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "Right pictures:", "", "| model | evaluations | weights | right |", "|---|---|---|---:|"]
    for model in ("tiny", "shapes"):
        for what, each in found.get(model, {}).get("rates", {}).items():
            for variant, rate in each.items() if isinstance(each, dict) else ():
                share = rate["all"] if isinstance(rate, dict) else rate
                lines.append(f"| {model} | {what} | {variant} | {percent(share)} |")
    lines += ["", "Bytes of weights:", "", "| network | bfloat16 | int8 | share |", "|---|---:|---:|---:|"]
    for model in ("tiny", "official"):
        for name, each in found.get(model, {}).get("bytes", {}).items():
            lines.append(f"| {model}, {name} | {each['bfloat16']:,} | {each['int8']:,} | {percent(each['share'])} |")
    if "memory" in found:
        lines += ["", "Peak memory that loading a prior of the official shape adds, bytes:", ""]
        lines += [f"- {name}: {size:,}" for name, size in found["memory"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("--shapes", type=Path, help="the folder of few_steps/shapes.py")
    parser.add_argument("--only", nargs="+", default=["tiny", "shapes", "errors", "rates", "memory"])
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    arguments = parser.parse_args()
    date = datetime.date.today().isoformat()
    target = arguments.output / f"int8-{date}.json"
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"date": date}
    found["cpus"] = os.cpu_count()

    def write() -> None:
        replace_file(target, (json.dumps(found, indent=1) + "\n").encode())
        replace_file(target.with_suffix(".md"), table(found).encode())

    for name, part in (("tiny", emoji), ("shapes", coloured)):
        if name in arguments.only:
            part(arguments, found.setdefault(name, {}), write)
            write()
    if "memory" in arguments.only:
        found["memory"] = memory()
        networks = {
            "unet": (UNet2DConditionModel, "kandinsky-2-2-decoder/unet"),
            "prior": (PriorTransformer, "kandinsky-2-2-prior/prior"),
            "movq's decoder": (VQModel, "kandinsky-2-2-decoder/movq"),
        }
        found["official"] = {"bytes": {name: official(*which) for name, which in networks.items()}}
        write()
    print(target)


if __name__ == "__main__":
    main()
