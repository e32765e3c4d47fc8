"""Distil the tests' model of coloured shapes, and count how many pictures are right in few steps.

    python tpu_scripts/few_steps/shapes.py build/shapes

writes captioned pictures, distils the decoder and the prior from their guided selves, and generates 200 captions that
are not in the data: with 50 guided steps of the decoder and 25 of the prior, and with few unguided ones. Writes
tpu_scripts/results/few-steps-shapes-DATE.json. Both trainings go on where they were stopped. About half an hour on two
CPU cores. With `--choose` it generates 600 other captions, some of which are in the data, guided and in 4 + 4
evaluations by several schedulers, and only prints what is right: so that the 200 decide nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import KandinskyV22CombinedPipeline, scheduler_named  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.lora import LoraConfig  # noqa: E402
from kandinsky_jax.training.config import Config  # noqa: E402
from kandinsky_jax.training.distillation import DistillationConfig  # noqa: E402
from kandinsky_jax.training.kinds import Kind  # noqa: E402
from kandinsky_jax.training.loop import Run  # noqa: E402
from kandinsky_jax.training.step import OptimizerConfig  # noqa: E402
from tests import shapes  # noqa: E402

MODEL = ROOT / "tests" / "shapes_model"
SEED, OTHER_SEED, COUNT, BATCH = 7, 11, 200, 25
# Attention, and of the decoder convolutions and projections too.
LAYERS = r"(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj|conv1|conv2|conv_shortcut|time_emb_proj|linear_1|linear_2)$"
# Steps of the prior and of the decoder without guidance, and its scheduler. DDIM is TCD without noise, and begins later
# here, at 750 of 1000: of no use for 1 or 2 steps.
FEW = (
    (4, 4, "ddim"),
    (4, 4, "tcd"),
    (25, 4, "ddim"),
    (4, 8, "ddim"),
    (4, 8, "tcd"),
    (4, 2, "tcd"),
    (2, 2, "tcd"),
    (4, 1, "tcd"),
)
CHOICE = ("tcd", "lcm", "ddim", "euler", "dpm++2m")
CHOICE_SEEDS = (21, 22, 23)


def write_pictures(folder: Path, count: int, drawings: int) -> None:
    """Write captioned pictures, some of each caption: of other positions and sizes. Without the captions to count."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(SEED), []
    counted = {asked.text for asked in shapes.captions(COUNT, seed=OTHER_SEED)}
    used = [asked for asked in shapes.captions(count, seed=SEED) if asked.text not in counted]
    for i, asked in enumerate(used * drawings):
        picture = (shapes.draw(asked, rng) * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": asked.text}) + "\n")
    replace_file(folder / "metadata.jsonl", "".join(lines).encode())


def config_of(folder: Path, kind: Kind, steps: int, rank: int) -> Config:
    """The configuration of a distillation."""
    return Config(
        model=str(MODEL),
        data=str(folder / "data"),
        output=str(folder / kind),
        resolution=shapes.SIDE,
        train_batch_size=32,
        precompute=True,
        optimizer=OptimizerConfig(
            learning_rate=2e-3 if kind == Kind.DISTILL_DECODER else 3e-4,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            max_train_steps=steps,
            adam_weight_decay=0.0,
            ema_decay=0.98,
        ),
        lora=LoraConfig(rank=rank, pattern=LAYERS),
        distillation=DistillationConfig(),
    )


def rates(pipe: Any, asked: Sequence[shapes.Caption], **settings: Any) -> dict[str, float]:
    """Shares of right pictures, of colour, background, shape and all of them."""
    found = []
    for first in tqdm(range(0, len(asked), BATCH), desc="generate", unit="batch"):
        texts = [one.text for one in asked[first : first + BATCH]]
        size = {"height": shapes.SIDE, "width": shapes.SIDE}
        found += map(shapes.classify, pipe(texts, generator=first, output_type="np", **size, **settings).images)
    return shapes.rates(found, [one.truth for one in asked])


def settings_of(prior_steps: int, steps: int, scale: float) -> dict[str, Any]:
    """Arguments of a call with these steps of both stages."""
    return {
        "prior_num_inference_steps": prior_steps,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "prior_guidance_scale": scale,
    }


def main() -> None:
    """Distil, generate, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the data and the trainings")
    parser.add_argument("--captions", type=int, default=600, help="in the data, default 600")
    parser.add_argument("--drawings", type=int, default=4, help="pictures of each, default 4")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA, default 32")
    parser.add_argument("--decoder-steps", type=int, default=6000)
    parser.add_argument("--prior-steps", type=int, default=400)
    parser.add_argument("--choose", action="store_true", help="compare schedulers on 600 other captions")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    arguments = parser.parse_args()
    write_pictures(arguments.folder / "data", arguments.captions, arguments.drawings)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    usual, adapters = pipe.scheduler, {}
    for kind, steps in (
        (Kind.DISTILL_DECODER, arguments.decoder_steps),
        (Kind.DISTILL_PRIOR, arguments.prior_steps),
    ):
        adapters[kind] = Run(kind, config_of(arguments.folder, kind, steps, arguments.rank)).train()
    if arguments.choose:
        asked = [caption for seed in CHOICE_SEEDS for caption in shapes.captions(COUNT, seed=seed)]
        print("guided", json.dumps(rates(pipe, asked, **settings_of(25, 50, 4.0))), flush=True)
        load(pipe, adapters)
        for name in CHOICE:
            pipe.scheduler = scheduler_named(name, usual.config)
            print(name, json.dumps(rates(pipe, asked, **settings_of(4, 4, 1.0))), flush=True)
        return
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "captions": COUNT}
    found |= {"decoder_training_steps": arguments.decoder_steps, "prior_training_steps": arguments.prior_steps}
    found |= {"rank": arguments.rank, "pictures": len(list((arguments.folder / "data").glob("*.png")))}
    asked = shapes.captions(COUNT, seed=OTHER_SEED)
    found["rates"] = {"25 + 50, guided": rates(pipe, asked, **settings_of(25, 50, 4.0))}
    for name in ("ddim", "tcd"):
        pipe.scheduler = scheduler_named(name, usual.config)
        found["rates"][f"4 + 4 by {name}, not distilled"] = rates(pipe, asked, **settings_of(4, 4, 1.0))
    load(pipe, adapters)
    for prior_steps, steps, name in FEW:
        pipe.scheduler = scheduler_named(name, usual.config)
        what = f"{prior_steps} + {steps} by {name}, distilled"
        found["rates"][what] = rates(pipe, asked, **settings_of(prior_steps, steps, 1.0))
        print(json.dumps(found["rates"], indent=1), flush=True)
    target = arguments.output / f"few-steps-shapes-{found['date']}.json"
    replace_file(target, (json.dumps(found, indent=1) + "\n").encode())
    print(target)


def load(pipe: Any, adapters: Mapping[str, Any]) -> None:
    """Load both adapters; both are active then."""
    for name, adapter in adapters.items():
        pipe.load_lora_weights(adapter, adapter_name=name)
    pipe.set_adapters(list(adapters))


if __name__ == "__main__":
    main()
