"""Two simulated devices: batches, guidance and rows shared between them, a job, and training with shared weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from digest_cases import Case, inputs
from digest_cases.batch_jobs import job
from digest_cases.modes import GUIDED, call
from digest_cases.training import DECODER, run

NAME = "KandinskyV22CombinedPipeline"


def cases() -> list[Case]:
    """All cases of the module."""
    found = [
        Case("two devices/text2img/two images", functools.partial(_default, {"num_images_per_prompt": 2}), quick=True),
        Case("two devices/text2img/three images", functools.partial(_default, {"num_images_per_prompt": 3})),
        Case("two devices/text2img/torch seed 3", functools.partial(_default, {"generator": ("torch", 3)})),
        Case("two devices/text2img/guidance shared", functools.partial(_on_mesh, (1, 2, 1))),
        Case("two devices/text2img/rows shared", functools.partial(_on_mesh, (1, 1, 2))),
        Case("two devices/batch/text2img", functools.partial(job, "text2img", ["--batch", "1"])),
    ]
    for mesh in ({"data": 2}, {"fsdp": 2}):
        settings = {"mesh": mesh}
        axis = next(iter(mesh))
        found.append(
            Case(f"two devices/training/lora-prior/{axis}", functools.partial(run, "lora-prior", DECODER, settings, {}))
        )
    found.append(
        Case("two devices/training/prior/fsdp", functools.partial(run, "prior", DECODER, {"mesh": {"fsdp": 2}}, {}))
    )
    return found


def _default(changes: dict[str, Any], _: Path) -> Any:
    return call(inputs.pipeline(NAME, inputs.TINY), **GUIDED | {"generator": 3} | changes)


def _on_mesh(axes: tuple[int, int, int], _: Path) -> Any:
    import kandinsky_jax as kj

    pipe = kj.KandinskyV22CombinedPipeline.from_pretrained(inputs.TINY, dtype="float32", mesh=kj.make_mesh(*axes))
    pipe.set_progress_bar_config(disable=True)
    return call(pipe, **GUIDED)
