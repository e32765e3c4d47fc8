"""Accuracy of the embedded model: the 500 most common emoji, by all of their captions.

    python tpu_scripts/train_tiny/evaluate.py build/emoji/data --model tiny

generates every caption of common.txt's first 500 emoji (their names, see pictures.py) and looks for the training
picture nearest to each, in pixels and in MoVQ's latents, among all of them. Writes the shares that are right, the
seconds a picture took, and which were mistaken for what, to tpu_scripts/results/emoji-DATE.json, and a contact sheet of
the first ones to docs/emoji.png.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.evaluation import nearest_candidates
from kandinsky_jax.training.data import listing
from kandinsky_jax.training.tasks.base import to_movq_pixels

ROOT = Path(__file__).parents[2]
COMMON = Path(__file__).with_name("common.txt")
SIDE, BATCH = 64, 32
SHEET = (20, 10)  # pictures across and down
# The prior's guesses are best unguided: it has learned its pictures by heart.
GUIDANCE, PRIOR_GUIDANCE = 2.0, 1.0


class Known(NamedTuple):
    """The training pictures, in one order."""

    codes: list[str]
    names: list[str]
    pixels: np.ndarray  # uint8 [N, 64, 64, 3]
    captions: dict[str, list[str]]  # of each code point sequence


def known(data: Path) -> Known:
    """What the model has been trained on."""
    items = listing(data / "pictures.tar")
    codes = [Path(item.name).stem for item in items]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(item.read())).convert("RGB")) for item in items])
    captions: dict[str, list[str]] = {}
    for item in listing(data / "captions.tar"):
        code, _, which = Path(item.name).stem.rpartition("-")
        if which.endswith("0"):  # the bare name, without "an emoji of"
            captions.setdefault(code, []).append(item.text)
    return Known(codes, [item.text for item in items], pixels, captions)


def common(there: Known, count: int) -> list[str]:
    """The commonest emoji's code points."""
    lines = [line.strip().lower() for line in COMMON.read_text().splitlines() if not line.startswith("#")]
    return [code for code in lines if code in there.captions][:count]


def generate(pipe: Any, prompts: list[str], **settings: Any) -> tuple[np.ndarray, float]:
    """Pictures uint8 `[N, 64, 64, 3]`, and the median of seconds per picture in a batch."""
    found, seconds = [], []
    for start in tqdm(range(0, len(prompts), BATCH), desc="generate", unit="batch"):
        some = prompts[start : start + BATCH]
        some += [some[-1]] * (BATCH - len(some))  # one shape, one program
        began = time.perf_counter()
        options = {"height": SIDE, "width": SIDE, "output_type": "np", **settings}
        pictures = pipe(some, generator=list(range(BATCH)), **options).images
        seconds.append((time.perf_counter() - began) / BATCH)
        found.append((pictures * 255).round().astype(np.uint8))
    return np.concatenate(found)[: len(prompts)], float(np.median(seconds))


def nearest(generated: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Of each row, the position of the nearest one; rows are flattened."""
    return nearest_candidates(*(x.reshape(len(x), -1) for x in (generated, there)), distance="euclidean")


def latents(pipe: Any, pixels: np.ndarray) -> np.ndarray:
    """MoVQ's, of many pictures."""
    network, params = Network.split(pipe.movq)
    chunks = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
    padded = [np.concatenate([chunk, np.repeat(chunk[-1:], BATCH - len(chunk), 0)]) for chunk in chunks]
    return np.concatenate([np.asarray(call(network, params, to_movq_pixels(x), method="encode")) for x in padded])[
        : len(pixels)
    ]


def sheet(generated: np.ndarray, right: np.ndarray, across: int, down: int) -> Image.Image:
    """The first pictures; a red bar under those whose nearest training picture is another one."""
    whole = Image.new("RGB", (across * SIDE, down * (SIDE + 3)), "white")
    for i in range(min(len(generated), across * down)):
        x, y = i % across * SIDE, i // across * (SIDE + 3)
        whole.paste(Image.fromarray(generated[i]), (x, y))
        if not right[i]:
            whole.paste((220, 40, 40), (x + 8, y + SIDE, x + SIDE - 8, y + SIDE + 2))
    return whole


def main() -> None:
    """Generate, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that pictures.py has written")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prior", help="where the decoder's folder does not say")
    parser.add_argument("--count", type=int, default=500, help="of the commonest emoji")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE)
    parser.add_argument("--prior-guidance-scale", type=float, default=PRIOR_GUIDANCE)
    parser.add_argument("--output", type=Path, default=ROOT, help="the folder of tpu_scripts/results and docs")
    arguments = parser.parse_args()
    there = known(arguments.data)
    codes = common(there, arguments.count)
    rows = [(code, text) for code in codes for text in there.captions[code]]
    pipe = KandinskyV22CombinedPipeline.from_pretrained(arguments.model, prior=arguments.prior, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    settings = {name: getattr(arguments, name) for name in ("guidance_scale", "prior_guidance_scale")}
    settings["num_inference_steps"] = arguments.steps
    generated, seconds = generate(pipe, [text for _, text in rows], **settings)
    wanted = np.array([there.codes.index(code) for code, _ in rows])
    first = np.array([text == there.names[i] for (_, text), i in zip(rows, wanted, strict=True)])
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "emoji": len(codes),
        "captions": len(rows),
        "training_pictures": len(there.codes),
        **settings,
        "seconds_per_picture": round(seconds, 3),
    }
    spaces = {"pixels": (generated, there.pixels), "latents": (latents(pipe, generated), latents(pipe, there.pixels))}
    taken = {space: nearest(*both) for space, both in spaces.items()}
    for space, which in taken.items():
        right = which == wanted
        found[space] = {"all_captions": round(right.mean(), 4), "names": round(right[first].mean(), 4)}
        found[f"{space}_mistaken"] = [[rows[i][1], there.names[which[i]]] for i in np.flatnonzero(~right) if first[i]]
    (arguments.output / "tpu_scripts" / "results").mkdir(parents=True, exist_ok=True)
    target = arguments.output / "tpu_scripts" / "results" / f"emoji-{found['date']}.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / "docs").mkdir(exist_ok=True)
    sheet(generated[first], (taken["pixels"] == wanted)[first], *SHEET).save(arguments.output / "docs" / "emoji.png")
    print(json.dumps({name: value for name, value in found.items() if not name.endswith("mistaken")}), target)


if __name__ == "__main__":
    main()
