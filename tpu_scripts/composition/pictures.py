"""Generate docs/composition-*.png and the figures of docs/composition.md.

Posterior sampling of 8 drawn pictures of coloured shapes, which no model has generated; the other pictures are those of
the programs in examples/composition. Takes about five minutes on two cores.

python tpu_scripts/composition/pictures.py --output tpu_scripts/results/composition-DATE.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import KandinskyV22CombinedPipeline, composition, diffusion  # noqa: E402
from kandinsky_jax.common import atomic  # noqa: E402
from kandinsky_jax.schedulers import DDIMScheduler  # noqa: E402
from tests import shapes  # noqa: E402

COUNT, STEPS, GUIDANCE, SHOWN = 8, 25, 4.0, 4
HOLE = np.pad(np.zeros((32, 32)), 16, constant_values=1)
OPERATORS = {  # with the step size
    "super-resolution, 16 x 16 to 64 x 64": (composition.downsampling(4), 0.6),
    "inpainting, the middle 32 x 32 missing": (composition.masking(HOLE), 0.2),
    "deblurring, sigma 3 pixels": (composition.gaussian_blur(3.0), 0.3),
}


def rms(difference: jax.Array) -> float:
    """Root mean square, of 255."""
    return round(127.5 * float(jnp.sqrt(jnp.mean(difference**2))), 1)


def posterior_figures() -> dict[str, object]:
    """Sample with and without the measurement; write docs/composition-posterior.png."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained(ROOT / "tests" / "shapes_model", dtype="float32")
    unet, movq = pipe.unet, pipe.movq
    captions, rng = shapes.captions(COUNT, seed=3), np.random.default_rng(0)
    truth = jnp.asarray(np.stack([shapes.draw(caption, rng) for caption in captions]) * 2 - 1, jnp.float32)
    embeds, negatives = pipe.prior_pipe([caption.text for caption in captions], generator=0, return_dict=False)
    cond, uncond = (jax.jit(unet.condition)(jnp.asarray(x)) for x in (embeds, negatives))
    schedule = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=False).schedule(STEPS)
    [noise] = diffusion.noise_source(0, COUNT, diffusion.DECODER_STREAM).initial((COUNT, 8, 8, 4))
    inner = diffusion.ClassifierFreeGuidance(GUIDANCE)

    @jax.jit
    def compiled(guider):
        return movq.decode(diffusion.sample(unet, noise, cond, uncond, schedule, guider=guider))

    def sample(guider):
        program = compiled.lower(guider).compile()
        start = time.perf_counter()
        return jax.block_until_ready(program(guider)), time.perf_counter() - start

    def row(pictures, measured):
        verdicts = [shapes.classify(np.clip(np.asarray(picture) / 2 + 0.5, 0, 1)) for picture in pictures]
        right = shapes.rates(verdicts, [caption.truth for caption in captions])["all"]
        away = {"measurement missed by": rms(measured), "picture missed by": rms(pictures - truth)}
        return away | {"shows its caption": right}

    (ordinary, of_ordinary), found = sample(inner), {}
    columns = [truth, ordinary]
    round_trip = jax.jit(lambda x: movq.decode(movq.encode(x)))(truth)
    for name, (operator, scale) in tqdm(OPERATORS.items(), desc="operators"):
        measurement = operator(truth)
        guider = composition.PosteriorSampling(composition.of_decoded(movq.decode, operator), measurement, scale, inner)
        fitting, of_fitting = sample(guider)
        found[name] = {
            "scale": scale,
            "time beside ordinary sampling": round(of_fitting / of_ordinary, 1),
            "ordinary sampling": row(ordinary, operator(ordinary) - measurement),
            "posterior sampling": row(fitting, operator(fitting) - measurement),
            "MoVQ's round trip of the truth": row(round_trip, operator(round_trip) - measurement),
        }
        columns += [jax.image.resize(measurement, truth.shape, "nearest"), fitting]
    by_picture = jnp.stack(columns, axis=1)[:SHOWN].reshape(-1, *truth.shape[1:])
    composition.save_grid(by_picture, ROOT / "docs" / "composition-posterior.png", columns=len(columns))
    return found


def example_figures() -> dict[str, object]:
    """Run the examples, copy their pictures to docs/, and return what they measure."""
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tests").mkdir()
        Path("tests/shapes_model").symlink_to(ROOT / "tests" / "shapes_model")
        for name in tqdm(("seeds_and_prompts", "interpolation", "panorama", "outpainting"), desc="examples"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                made = runpy.run_path(str(ROOT / "examples" / "composition" / f"{name}.py"))
            with Image.open(f"{name}.png") as picture:
                picture.save(ROOT / "docs" / f"composition-{name}.png")
            if name == "seeds_and_prompts":
                [difference] = re.findall(r"[\d.]+e-\d+", printed.getvalue())
                found["vmap beside single calls, largest difference"] = float(difference)
                found["programs of 12 pictures by vmap"] = made["of_seeds_and_prompts"]._cache_size()
            elif name == "panorama":
                steps = np.abs(np.diff(np.asarray(made["turned"])[0], axis=1)).mean(axis=(0, 2)) * 127.5
                found["panorama: step from pixel to pixel at the seam, of 255"] = round(float(steps[127]), 2)
                found["panorama: step from pixel to pixel, mean, of 255"] = round(float(steps.mean()), 2)
            elif name == "outpainting":
                kept = np.asarray(made["picture"], np.float32)[:, :24]
                away = [np.abs(np.asarray(image, np.float32)[:, :24] - kept).mean() for image in made["images"]]
                found["outpainting: kept pixels beside the picture, mean difference, of 255"] = round(
                    float(max(away)), 2
                )
        os.chdir(ROOT)
    return found


def main() -> None:
    """Write the pictures and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    output = parser.parse_args().output.absolute()
    settings = {"pictures": COUNT, "steps": STEPS, "solver": "DDIM, no thresholding", "guidance": GUIDANCE}
    figures = {"jax": jax.__version__, "posterior sampling": settings | posterior_figures(), **example_figures()}
    atomic.replace_file(output, (json.dumps(figures, indent=2, default=float) + "\n").encode())


if __name__ == "__main__":
    main()
