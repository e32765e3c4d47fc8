"""Training runs of every kind through the command line: losses, and the bytes of what is exported."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from digest_cases import Case, inputs
from digest_cases.commands import kandinsky_jax
from digest_cases.values import folder_bytes

DECODER = "kandinsky-2-2-decoder"
TIMES = ("images_per_second",)  # of a line of metrics
SAME: dict[str, Any] = {"resolution": 64, "train_batch_size": 2, "checkpointing_steps": 100}
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-3, "max_train_steps": 3}
# (kind, model, settings, the optimizer's settings, quick)
RUNS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], bool]] = {
    "prior": ("prior", DECODER, {}, {}, False),
    "decoder": ("decoder", DECODER, {}, {}, False),
    "decoder of inpainting": ("decoder", "kandinsky-2-2-decoder-inpaint", {}, {}, False),
    "decoder of depth hints": ("decoder", "kandinsky-2-2-controlnet-depth", {}, {}, False),
    "lora-prior": ("lora-prior", DECODER, {}, {}, True),
    "lora-decoder": ("lora-decoder", DECODER, {"lora": {"rank": 2, "alpha": 1.0}}, {}, False),
    "movq": ("movq", DECODER, {"quantized_share": 0.5}, {}, False),
    "clip": ("clip", "kandinsky-2-2-prior", {}, {}, False),
    "prior/average, warm-up, dropout, min-SNR": (
        "prior", DECODER, {"condition_dropout": 0.5, "snr_gamma": 5.0, "seed": 3, "text_length": 16},
        {"ema_decay": 0.9, "lr_warmup_steps": 2, "lr_scheduler": "cosine"}, False,
    ),
    "lora-prior/accumulated, encoded before": (
        "lora-prior", DECODER, {"precompute": True},
        {"gradient_accumulation_steps": 2, "lr_scheduler": "linear"}, False,
    ),
    "lora-decoder/bfloat16, flips, crops, min-SNR": (
        "lora-decoder", DECODER, {"random_flip": True, "random_crop": True, "snr_gamma": 5.0},
        {"dtype": "bfloat16", "max_grad_norm": 0.1}, False,
    ),
    "lora-prior/sample pictures": (
        "lora-prior", DECODER, {"validation_steps": 3, "validation_prompts": inputs.SHAPE_PROMPTS[:1]}, {}, False,
    ),
}  # fmt: skip


def cases() -> list[Case]:
    """All cases of the module."""
    return [
        Case(f"training/{name}", functools.partial(run, kind, model, settings, optimizer), quick)
        for name, (kind, model, settings, optimizer, quick) in RUNS.items()
    ]


def run(kind: str, model: str, settings: dict[str, Any], optimizer: dict[str, Any], folder: Path) -> Any:
    """Train a few steps.

    Returns:
        the lines of metrics.jsonl without times, and the files of the result.
    """
    (folder / "models").symlink_to(inputs.SHAPES_MODEL, target_is_directory=True)
    inputs.training_data(folder / "data", hints=model.endswith("depth"))
    write_config(folder, model, settings, optimizer)
    kandinsky_jax(folder, "train", kind, "run.toml", "--quiet")
    return result_of(folder / "run")


def write_config(folder: Path, model: str, settings: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """run.toml in a folder whose training data lies in data/, for results in run/."""
    given = {"model": f"models/{model}", "data": "data", "output": "run", **SAME, **settings}
    given["optimizer"] = OPTIMIZER | optimizer
    (folder / "run.toml").write_text(_toml(given))


def result_of(folder: Path) -> dict[str, Any]:
    """Losses and exported files of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "model": folder_bytes(folder / "model"),
        "samples": folder_bytes(folder / "samples") if (folder / "samples").exists() else {},
    }


def _toml(table: dict[str, Any]) -> str:
    """TOML of plain values, and of tables one deep."""
    plain = {name: value for name, value in table.items() if not isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for name, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(item)}" for key, item in value.items())]
    return "\n".join(lines) + "\n"
