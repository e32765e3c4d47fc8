"""Comparison of solvers and numbers of evaluations, on a model of shapes or a folder of weights.

    python tpu_scripts/bench/scheduler_guide.py                  # tests/shapes_model, half an hour on two cores
    python tpu_scripts/bench/scheduler_guide.py --names ddpm dpm++2m --captions 400 --evaluations 10 15 20 50
    python tpu_scripts/bench/scheduler_guide.py --model FOLDER --no-scorer --size 512 --captions 16   # official weights

The same captions and the same first noise for every solver. Of each picture: how far it is from where DDIM in 1000
steps ends (for solvers that add no noise on the way), and whether it shows what was asked for, by the tests' scorer
of drawings of shapes. Then, at 25 evaluations, the share of right pictures in image-to-image and inpainting.
Writes scheduler-guide-DATE.json, .md and .png to tpu_scripts/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax import (
    DDIMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    SchedulerError,
    scheduler_named,
)
from kandinsky_jax.pipelines import checks
from kandinsky_jax.schedulers import NAMES, Scheduler

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the scorer is the tests'
from tests import shapes  # noqa: E402

SHAPES = "shapes"  # the name of the tests' model here
SHAPES_MODEL = ROOT / "tests" / "shapes_model"
RESULTS = ROOT / "tpu_scripts" / "results"
BATCH = 25
EVALUATIONS = (5, 8, 10, 15, 20, 25, 50, 100)
MODE_CAPTIONS = 25
EXACT_STEPS = 1000
IN_EVERY_MODE = 25
STRENGTH = 0.8  # of image-to-image
# A name of the command line, and behind a colon a field to turn on.
CONSISTENT = "ddim:use_clipped_model_output"  # thresholds the picture and the noise together
RESPACED = (
    "dpm++2m",
    "dpm++3m",
    "deis",
    "dpm++2m-sde",
    "dpm++sde",
    "unipc",
    "sa",
    "euler",
    "heun",
    "dpm2",
    "dpm2-a",
    "lms",
)
SETTINGS = (*NAMES, CONSISTENT, *(f"{name}-karras" for name in RESPACED))
# What generates right at 25 evaluations and this guidance, where the plain form does not; see docs/schedulers.md.
BETTER = {"ddim": CONSISTENT} | {
    name: f"{name}-karras" for name in ("dpm++3m", "deis", "dpm++2m-sde", "dpm++sde", "sa", "heun", "dpm2", "dpm2-a")
}
GUIDANCE = 4.0
GENTLE, GENTLE_GUIDANCE = ("lms", "pndm", "plms", "lcm", "ipndm"), 2.0  # none of their forms does: less guidance
LONG, FEW = ("ddpm", "ddim", "dpm++2m", "unipc", "euler", "heun"), 25  # the others stop at so many evaluations
BASELINE, BASELINE_EVALUATIONS = "ddpm", 50


def scheduler_of(setting: str, config: Any) -> Scheduler:
    """A scheduler by one of `SETTINGS`."""
    name, _, field = setting.partition(":")
    scheduler = scheduler_named(name, config)
    return type(scheduler).from_config(scheduler.config, **{field: True}) if field else scheduler


def steps_for(scheduler: Scheduler, evaluations: int, strength: float | None = None) -> int | None:
    """The most steps that cost no more than so many evaluations of the network; None where one costs more."""
    best = None
    for steps in range(1, 4 * evaluations + 2):
        try:
            length = len(scheduler.schedule(steps, checks.skipped(strength, scheduler.steps(steps))))
        except (SchedulerError, ValueError):  # too few for this solver, or for this strength
            continue
        if length > evaluations:
            break
        best = steps
    return best


def share_right(pictures: np.ndarray, captions: list[shapes.Caption]) -> float:
    """Colour, background and shape all as asked."""
    return float(shapes.rates(map(shapes.classify, pictures), [c.truth for c in captions])["all"])


def in_batches(pipe: Any, embeds: tuple[np.ndarray, np.ndarray], size: int, **settings: Any) -> np.ndarray:
    """The decoder's pictures for embeddings `[N, D]`, float32 `[N, H, W, 3]` in 0..1, batch by batch."""
    generated = []
    for first in range(0, len(embeds[0]), BATCH):
        rows = slice(first, first + BATCH)
        own = {name: value[rows] if isinstance(value, list) else value for name, value in settings.items()}
        own |= dict(zip(("image_embeds", "negative_image_embeds"), (x[rows] for x in embeds), strict=True))
        generated.append(pipe(height=size, width=size, output_type="np", generator=first, **own).images)
    return np.concatenate(generated)


class Modes:
    """Image-to-image and inpainting of drawings of another shape, on the tests' model."""

    def __init__(self, pipe: KandinskyV22CombinedPipeline, config: Any, captions: list[shapes.Caption], embeds: Any):
        self.captions, self.embeds, self.config = captions, embeds, config
        rng = np.random.default_rng(7)
        # Another shape and colour on the background that is asked for, in the middle of the picture.
        others = [
            shapes.Verdict(
                _next(c.truth.colour, shapes.COLOURS, c.truth.background),
                c.truth.background,
                _next(c.truth.shape, shapes.SHAPES),
            )
            for c in captions
        ]
        self.sources = [shapes.draw(shapes.caption(truth), rng) for truth in others]
        middle = np.zeros((shapes.SIDE, shapes.SIDE), bool)
        middle[4:-4, 4:-4] = True
        decoder = pipe.decoder_pipe
        self.img2img = KandinskyV22Img2ImgPipeline(decoder.unet, decoder.scheduler, decoder.movq)
        inpaint = KandinskyV22InpaintCombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
        self.inpaint = inpaint.decoder_pipe
        self.calls: dict[str, tuple[Any, float | None, dict[str, Any]]] = {
            "text2img": (decoder, None, {}),
            "img2img": (self.img2img, STRENGTH, {"image": self.sources, "strength": STRENGTH}),
            "inpaint": (self.inpaint, None, {"image": self.sources, "mask_image": [middle] * len(captions)}),
        }
        for pipeline, _, _ in self.calls.values():
            pipeline.set_progress_bar_config(disable=True)

    def rate(self, mode: str, name: str, evaluations: int, guidance: float = GUIDANCE) -> float | None:
        """Share of right pictures of a setting; None where it needs more evaluations."""
        pipeline, strength, settings = self.calls[mode]
        pipeline.scheduler = scheduler_of(name, self.config)
        steps = steps_for(pipeline.scheduler, evaluations, strength)
        if steps is None:
            return None
        pictures = in_batches(
            pipeline, self.embeds, shapes.SIDE, num_inference_steps=steps, guidance_scale=guidance, **settings
        )
        return share_right(pictures, self.captions)


def _next(value: str, options: tuple[str, ...], besides: str = "") -> str:
    """Another of the options."""
    return next(x for x in (options * 2)[options.index(value) + 1 :] if x != besides)


def sweep(generate: Callable[..., np.ndarray], config: Any, given: argparse.Namespace, captions: Any) -> list[dict]:
    """Every solver at every number of evaluations."""
    exact = None
    if given.reference:
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", use_clipped_model_output=True)
        exact = generate(scheduler, EXACT_STEPS)
    rows = []
    for name in tqdm(given.names, unit="solver"):
        scheduler = scheduler_of(name, config)
        for evaluations in given.evaluations:
            steps = steps_for(scheduler, evaluations)
            if steps is None or (evaluations > FEW and name not in given.long):
                continue
            schedule = scheduler.schedule(steps)
            pictures = generate(scheduler, steps)
            noisy = bool(schedule.draws_noise.any())
            row = {"name": name, "steps": steps, "evaluations": len(schedule), "noisy": noisy}
            row["rms_255"] = None
            if exact is not None and not noisy:
                row["rms_255"] = round(float(np.sqrt(np.mean((pictures - exact) ** 2))) * 255, 2)
            if given.scorer:
                row["right"] = round(share_right(pictures, captions), 4)
            rows.append(row)
    return rows


def table(found: dict[str, Any]) -> str:
    """Markdown: one line per solver, one column per number of evaluations: share of right pictures / distance."""
    columns = found["evaluations"]
    text = f"| | {' | '.join(map(str, columns))} |\n|---|{'---|' * len(columns)}\n"
    for name in dict.fromkeys(row["name"] for row in found["sweep"]):
        cells = []
        for evaluations in columns:
            own = [r for r in found["sweep"] if r["name"] == name and r["evaluations"] <= evaluations]
            row = own[-1] if own else None
            if row is None or row["evaluations"] < 0.7 * evaluations:
                cells.append("")
                continue
            right = f"{row['right']:.2f}" if "right" in row else ""
            cells.append(right + (f" / {row['rms_255']:.0f}" if row["rms_255"] is not None else ""))
        text += f"| `{name}` | {' | '.join(cells)} |\n"
    return text


def modes_table(found: dict[str, Any]) -> str:
    """Markdown: share of right pictures by mode."""
    text = "| | text2img | img2img | inpaint |\n|---|---|---|---|\n"
    for name, rates in found["modes"].items():
        cells = ["" if rate is None else f"{rate:.2f}" for rate in rates.values()]
        text += f"| `{name}` | {' | '.join(cells)} |\n"
    return text


def plot(found: dict[str, Any], path: Path) -> None:
    """Error and share of right pictures by evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 7.5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for i, name in enumerate(dict.fromkeys(row["name"] for row in found["sweep"])):
        rows = [row for row in found["sweep"] if row["name"] == name]
        style = {"color": colours[i % 20], "linestyle": "-" if i < 20 else "--", "marker": ".", "label": name}
        axis = [row["evaluations"] for row in rows]
        if rows[0]["rms_255"] is not None:
            left.plot(axis, [row["rms_255"] for row in rows], **style)
        if "right" in rows[0]:
            right.plot(axis, [row["right"] for row in rows], **style)
    left.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="RMS from DDIM in 1000 steps, of 255")
    right.set(xscale="log", xlabel="evaluations", ylabel="share of right pictures")
    for axes in (left, right):
        axes.set_xticks(found["evaluations"], map(str, found["evaluations"]))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles or left.get_legend_handles_labels()[0],
        labels or left.get_legend_handles_labels()[1],
        loc="outside right upper",
        fontsize=8,
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHAPES, help=f'"{SHAPES}" (of the tests), a folder or a Hub repository')
    parser.add_argument(
        "--names", nargs="+", default=SETTINGS, metavar="NAME", help="as for the command line's --scheduler"
    )
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--long", nargs="+", default=LONG, metavar="NAME", help=f"of them, those that go beyond {FEW}")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--size", type=int, default=shapes.SIDE, help="of a picture's side, in pixels")
    parser.add_argument("--no-scorer", dest="scorer", action="store_false", help="the model generates other things")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="no distances, no 1000 steps")
    parser.add_argument("--no-modes", dest="modes", action="store_false", help="text-to-image alone")
    parser.add_argument("--output", type=Path, help="without its ending; default: results/scheduler-guide-DATE")
    given = parser.parse_args()
    pipe = KandinskyV22CombinedPipeline.from_pretrained(
        SHAPES_MODEL if given.model == SHAPES else given.model, dtype="float32"
    )
    pipe.set_progress_bar_config(disable=True)
    config, captions = pipe.scheduler.config, shapes.captions(given.captions)
    for name in given.names:
        scheduler_of(name, config)
    embeds = tuple(
        np.concatenate(parts)
        for parts in zip(
            *(
                pipe.prior_pipe(
                    [c.text for c in captions[i : i + BATCH]], generator=i, output_type="np", return_dict=False
                )
                for i in range(0, len(captions), BATCH)
            ),
            strict=True,
        )
    )

    def generate(scheduler: Scheduler, steps: int) -> np.ndarray:
        pipe.scheduler = scheduler
        return in_batches(pipe.decoder_pipe, embeds, given.size, num_inference_steps=steps)

    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "model": given.model,
        "captions": given.captions,
        "guidance_scale": GUIDANCE,
        "evaluations": list(given.evaluations),
        "sweep": sweep(generate, config, given, captions),
        "modes": {},
    }
    output = given.output or RESULTS / f"scheduler-guide-{found['date']}"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")  # so that it is not lost
    if given.modes and given.scorer and given.model == SHAPES:
        modes = Modes(pipe, config, captions[:MODE_CAPTIONS], tuple(x[:MODE_CAPTIONS] for x in embeds))
        baseline = f"{BASELINE} in {BASELINE_EVALUATIONS}"
        found["modes"][baseline] = {m: modes.rate(m, BASELINE, BASELINE_EVALUATIONS) for m in modes.calls}
        for name in tqdm([name for name in NAMES if name in given.names], unit="solver"):
            setting, guidance = BETTER.get(name, name), GENTLE_GUIDANCE if name in GENTLE else GUIDANCE
            rates = {mode: modes.rate(mode, setting, IN_EVERY_MODE, guidance) for mode in modes.calls}
            found["modes"][setting if guidance == GUIDANCE else f"{setting}, guidance {guidance:g}"] = rates
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    output.with_suffix(".md").write_text(f"{table(found)}\n{modes_table(found)}")
    plot(found, output.with_suffix(".png"))
    print(table(found), modes_table(found), sep="\n")


if __name__ == "__main__":
    main()
