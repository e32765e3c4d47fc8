"""Measure previews of latents by linear maps, and write the map of a model into its folder.

python tpu_scripts/serve/previews.py OUT [--store]

compares maps of 1 x 1, 3 x 3 and 5 x 5 latents to one or four pixels for each, fitted to the drawn pictures themselves
or to what MoVQ decodes from their latents, on other drawn pictures and on 50 emoji that `tiny` generates. It writes
OUT.md, and OUT.png: previews of predicted pictures after steps 1, 5, 10 and 25 of 25, the map's and the plain average
of the last picture's pixels, and the picture. --store writes the map into the embedded model's folder, and its
manifest anew. A minute or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline
from kandinsky_jax.checkpoint import hub, preview_map
from kandinsky_jax.checkpoint.drawn_pictures import drawn_pictures
from kandinsky_jax.checkpoint.manifest import write_manifest
from kandinsky_jax.checkpoint.preview_map import PreviewMap, encoded_and_decoded, fit_to, small_pictures
from kandinsky_jax.serve.preview import LatentPreview

NAMES = (
    "snowman,red apple,red heart,rocket,penguin,slice of pizza,christmas tree,skull,tulip,cat face,grinning face,"
    "soccer ball,banana,house,fish,umbrella,purple heart,blue circle,green book,dog face,pig face,bear,lion,fox,"
    "frog,monkey face,unicorn,octopus,butterfly,lady beetle,turtle,whale,sunflower,rose,cactus,mushroom,grapes,"
    "watermelon,lemon,strawberry,carrot,hamburger,birthday cake,teacup,airplane,bicycle,ambulance,guitar,trophy,key"
).split(",")
STEPS, SHOWN, AFTER = 25, 10, (1, 5, 10, 25)
FITTED, HELD_OUT = 128, 64  # drawn pictures
CELL = 64


def generated(pipe: KandinskyV22CombinedPipeline) -> list[np.ndarray]:
    """Return what is predicted for the end after each step, `[B, h, w, C]`; the last one is what is decoded.

    DDIM's step from a sample to the next is along a line, so that two samples tell the clean one.
    """
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
    samples: list[np.ndarray] = []
    times: list[int] = []

    def keep(pipe: object, step: int, timestep: int, tensors: dict[str, object]) -> dict[str, object]:
        samples.append(np.asarray(tensors["latents"]).transpose(0, 2, 3, 1))
        times.append(int(timestep))
        return {}

    size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    guidance = {"guidance_scale": 2.0, "prior_guidance_scale": 1.0}
    pipe(list(NAMES), generator=0, callback_on_step_end=keep, **size, **guidance)
    alphas = [float(pipe.scheduler.alphas_cumprod[t]) for t in times[1:]]  # of the samples after each step but the last
    found = []
    for i in range(len(samples) - 1):
        after = alphas[i + 1] if i + 1 < len(alphas) else 1.0
        (a, s), (b, r) = ((alpha**0.5, (1 - alpha) ** 0.5) for alpha in (alphas[i], after))
        found.append((s * samples[i + 1] - r * samples[i]) / (s * b - r * a))
    return [found[0], *found]  # the first step's prediction is known by the second one's alone


def score(one: PreviewMap, latents: np.ndarray, pixels: np.ndarray) -> tuple[float, float]:
    """Return R^2, and the mean error in levels of 255, against averaged pixels."""
    wanted = small_pictures(pixels, latents.shape[1] * len(one.bias))
    error = one(latents).clip(-1, 1) - wanted
    spread = wanted - wanted.mean((0, 1, 2))
    return 1 - float((error**2).sum() / (spread**2).sum()), float(np.abs(error).mean() * 127.5)


def table(movq: object, latents: np.ndarray, pixels: np.ndarray) -> str:
    """Compare maps; returns Markdown."""
    drawn = drawn_pictures(FITTED, 64)
    fitted = encoded_and_decoded(movq, drawn)
    others = encoded_and_decoded(movq, drawn_pictures(HELD_OUT, 64, seed=1))
    lines = [
        "| latents | pixels | fitted to | R^2, drawn | error, drawn | R^2, emoji | error, emoji |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in (1, 2):
        for neighbours in (1, 3, 5):
            for target, name in ((drawn, "drawn pictures"), (fitted[1], "what is decoded")):
                one = fit_to(fitted[0], target, neighbours, side)
                (r, e), (r_emoji, e_emoji) = score(one, *others), score(one, latents, pixels)
                lines.append(
                    f"| {neighbours} x {neighbours} | {side} x {side} | {name} | {r:.3f} | {e:.1f} "
                    f"| {r_emoji:.3f} | {e_emoji:.1f} |"
                )
    return "\n".join(lines)


def milliseconds(preview: LatentPreview, side: int) -> float:
    """Return the time of one preview."""
    latents = np.random.default_rng(0).normal(size=(side, side, preview.map.channels)).astype(np.float32)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        preview(latents)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Put pictures of any size into rows of cells."""
    made = Image.new("RGB", (CELL * SHOWN, CELL * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row[:SHOWN]):
            made.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (CELL * x, CELL * y))
    return made


def pictures(pixels: np.ndarray) -> list[Image.Image]:
    """Convert pixels in -1..1."""
    return [Image.fromarray(each) for each in ((pixels + 1) * 127.5).round().astype(np.uint8)]


def main() -> None:
    """Measure, and store the map on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--store", action="store_true", help="write the map into the embedded model")
    arguments = parser.parse_args()
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    if arguments.store:
        began = time.perf_counter()
        preview_map.store(pipe.movq, hub.EMBEDDED["tiny"] / hub.DECODER / "movq")
        write_manifest(hub.EMBEDDED["tiny"])
        print(f"fitted and stored in {time.perf_counter() - began:.1f} s")
    predicted = generated(pipe)
    decoded = np.asarray(pipe.movq.decode(predicted[-1])).clip(-1, 1)
    own = LatentPreview(preview_map.of(pipe.movq))
    r, e = score(own.map, predicted[-1], decoded)
    lines = [
        "# Previews of latents\n",
        f"`tiny`, {len(NAMES)} emoji in {STEPS} steps of DDIM, and {HELD_OUT} drawn pictures that were not fitted. R^2 "
        "and the mean error, in levels of 255, of a map's pixels against the averages of those that MoVQ decodes.\n",
        table(pipe.movq, predicted[-1], decoded),
        f"\nThe map of the model's folder: R^2 {r:.3f} and error {e:.1f} on emoji; {milliseconds(own, 8):.2f} ms for a "
        f"picture of 8 x 8 latents, {milliseconds(own, 64):.2f} ms for 64 x 64.\n",
        "Against the same averages of the final picture, previews of what is predicted:\n",
        "| after step | error |\n|---|---|",
    ]
    wanted = small_pictures(decoded, len(decoded[0]) // 8 * preview_map.SIDE)
    for step in AFTER:
        error = np.abs(own.map(predicted[step - 1]).clip(-1, 1) - wanted).mean() * 127.5
        lines.append(f"| {step} | {error:.1f} |")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    rows = [own(predicted[step - 1]) for step in AFTER]
    shown = sheet([*rows, pictures(wanted), pictures(decoded)]).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    shown.save(arguments.out.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
