"""What the embedded model's fast adapters cost in quality: shares of right emoji, with them and with guided steps.

    python tpu_scripts/train_tiny/evaluate_fast.py build/emoji/data --model build/emoji/tiny

generates every name of the 500 commonest emoji (see evaluate.py) with 25 guided steps, and with 1, 2 and 4 unguided
ones of the decoder, the prior in 25 and in 4; then the first 200 of them in the other modes, with 25 guided steps and
in 4: repainting the middle of the picture, from its depth map, from its grey version, and mixed with the picture
itself. A picture is right where the nearest of all training pictures, by MoVQ's latents, is the asked one. Writes
tpu_scripts/results/emoji-fast-DATE.json, and docs/emoji-fast.png: the same names guided and fast, above each other.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from evaluate import BATCH, GUIDANCE, PRIOR_GUIDANCE, ROOT, SIDE, Known
from PIL import Image
from tqdm.auto import tqdm

from kandinsky_jax import (
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.training.data import listing

USUAL = {"num_inference_steps": 25, "guidance_scale": GUIDANCE, "prior_guidance_scale": PRIOR_GUIDANCE}
# (steps of the prior, steps of the decoder)
FEW = ((25, 4), (4, 4), (4, 2), (4, 1))
OTHERS = 200  # names in the other modes
ACROSS = 12


def depth_maps(data: Path) -> dict[str, Image.Image]:
    """The depth map of each emoji as it is, by its code points."""
    found = {}
    for item in listing(data / "views.tar"):
        code, _, which = Path(item.name).stem.rpartition("-")
        if which == "0" and item.hint is not None:
            found[code] = Image.open(io.BytesIO(item.hint())).convert("L")
    return found


class Judge:
    """Which training picture is nearest.

    Args:
        pipe: whose MoVQ measures.
        there: the training pictures.
        rows: (code points, prompt) of each generated picture.
    """

    def __init__(self, pipe: Any, there: Known, rows: Sequence[tuple[str, str]]):
        self._pipe, self._all = pipe, evaluate.latents(pipe, there.pixels)
        self._wanted = np.array([there.codes.index(code) for code, _ in rows])

    def right(self, pictures: np.ndarray) -> np.ndarray:
        """Whether each picture is right; fewer than all are the first ones."""
        nearest = evaluate.nearest(evaluate.latents(self._pipe, pictures), self._all)
        return nearest == self._wanted[: len(pictures)]


def in_batches(call: Any, prompts: Sequence[str], **given: Sequence[Any]) -> np.ndarray:
    """Generate pictures uint8 `[N, 64, 64, 3]`, in batches of one shape."""
    found = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="generate", unit="batch"):
        which = [min(start + i, len(prompts) - 1) for i in range(BATCH)]
        some = {name: [values[i] for i in which] for name, values in given.items()}
        found.append(call([prompts[i] for i in which], **some))
    return (np.concatenate(found)[: len(prompts)] * 255).round().astype(np.uint8)


def other_modes(
    model: str, prior: str | None, there: Known, rows: Sequence[tuple[str, str]], data: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Pictures of the other modes, by mode: "usual" and "fast"."""
    texts = [text for _, text in rows]
    pictures = [Image.fromarray(there.pixels[there.codes.index(code)]) for code, _ in rows]
    maps = depth_maps(data)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = True
    grey = [picture.convert("L").convert("RGB") for picture in pictures]
    modes: dict[str, tuple[Any, dict[str, Sequence[Any]], dict[str, Any]]] = {
        "inpaint": (KandinskyV22InpaintCombinedPipeline, {"image": pictures}, {"mask_image": mask}),
        "controlnet": (KandinskyV22ControlnetCombinedPipeline, {"hint": [maps[code] for code, _ in rows]}, {}),
        "img2img": (KandinskyV22Img2ImgCombinedPipeline, {"image": grey}, {"strength": 0.8}),
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    for mode, (cls, given, constant) in modes.items():
        pipe = cls.from_pretrained(model, prior=prior, dtype="float32")
        pipe.set_progress_bar_config(disable=True)

        constant |= {"generator": list(range(BATCH)), "height": SIDE, "width": SIDE, "output_type": "np"}
        found[mode] = {}
        for name in ("usual", "fast"):
            settings = constant | (USUAL if name == "usual" else pipe.load_fast())

            def call(prompts: list[str], pipe=pipe, settings=settings, **some: Any) -> np.ndarray:
                return pipe(prompts, **settings, **some).images

            found[mode][name] = in_batches(call, texts, **given)
    found["mix"] = mixed(model, prior, texts, pictures)
    return found


def mixed(model: str, prior: str | None, texts: list[str], pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """Pictures from the mean of a name's and its picture's embedding, "usual" and "fast"."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model, prior=prior, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for name in ("usual", "fast"):
        settings = dict(USUAL if name == "usual" else pipe.load_fast())
        of_prior = {n.removeprefix("prior_"): settings.pop(n) for n in list(settings) if n.startswith("prior_")}

        def call(prompts: list[str], image: list[Image.Image], of_prior=of_prior, settings=settings) -> np.ndarray:
            embeds = [
                pipe.prior_pipe.interpolate([text, picture], [0.5, 0.5], generator=i, **of_prior)
                for i, (text, picture) in enumerate(zip(prompts, image, strict=True))
            ]
            both = [np.concatenate([np.asarray(one[i]) for one in embeds]) for i in range(2)]
            size = {"height": SIDE, "width": SIDE, "output_type": "np"}
            return pipe.decoder_pipe(*both, generator=list(range(BATCH)), **size, **settings).images

        found[name] = in_batches(call, texts, image=pictures)
    return found


def above_each_other(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of pictures in one."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row[:ACROSS]), axis=1) for row in rows]))


def main() -> None:
    """Generate, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that pictures.py has written")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prior", help="where the decoder's folder does not say")
    parser.add_argument("--output", type=Path, default=ROOT, help="the folder of tpu_scripts/results and docs")
    arguments = parser.parse_args()
    there = evaluate.known(arguments.data)
    rows = [(code, text) for code in evaluate.common(there, 500) for text in there.captions[code]]
    pipe = KandinskyV22CombinedPipeline.from_pretrained(arguments.model, prior=arguments.prior, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    judge, texts = Judge(pipe, there, rows), [text for _, text in rows]
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "names": len(rows)}
    pictures = {"25 + 25, guided": evaluate.generate(pipe, texts, **USUAL)[0]}
    fast = pipe.load_fast()
    found["fast"] = fast
    for prior_steps, steps in FEW:
        settings = fast | {"prior_num_inference_steps": prior_steps, "num_inference_steps": steps}
        pictures[f"{prior_steps} + {steps}, fast"] = evaluate.generate(pipe, texts, **settings)[0]
    found["right"] = {name: round(judge.right(some).mean(), 4) for name, some in pictures.items()}
    print(json.dumps(found, indent=1), flush=True)
    others = other_modes(arguments.model, arguments.prior, there, rows[:OTHERS], arguments.data)
    found["other_modes"] = {
        mode: {name: round(judge.right(some).mean(), 4) for name, some in both.items()} for mode, both in others.items()
    }
    found["other_modes"]["names"] = OTHERS
    text = json.dumps(found, indent=1) + "\n"
    (arguments.output / "tpu_scripts" / "results").mkdir(parents=True, exist_ok=True)
    (arguments.output / "docs").mkdir(exist_ok=True)
    target = arguments.output / "tpu_scripts" / "results" / f"emoji-fast-{found['date']}.json"
    replace_file(target, text.encode())
    shown = [*pictures.values(), *(some for both in others.values() for some in both.values())]
    above_each_other(shown).save(arguments.output / "docs" / "emoji-fast.png")
    print(text, target)


if __name__ == "__main__":
    main()
