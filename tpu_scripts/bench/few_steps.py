"""Wall time of a call with few evaluations and no guidance, as distilled checkpoints allow, beside the usual call.

Usual: 25 steps of the prior and 50 of the decoder, both at guidance 4. Few: 4 steps of each at guidance 1, the
decoder's with `lcm`. Both from the prompt to the picture, in turns, in one process that has compiled everything.
Weights are not distilled, because time does not depend on their values, and an adapter is merged into them before.
`official` is of random weights in the official shapes, but for the vision tower, which has two layers: it runs once for
a model, not for a picture.

Writes tpu_scripts/results/few-steps-DATE.json; rows of other models, sizes and batches in that file are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import KandinskyV22CombinedPipeline, scheduler_named  # noqa: E402
from kandinsky_jax.checkpoint import hub  # noqa: E402
from tpu_scripts.bench import random_models  # noqa: E402

PROMPT = "red cat, 4k photo"
GUIDANCE = 4.0
PRIOR_STEPS, STEPS, FEW_STEPS = 25, 50, 4
USUAL, FEW = "usual", "few"
SIZES = {"tiny": 64, "official": 512}
BATCHES = {"tiny": [1, 8], "official": [1]}
PAIRS = {"tiny": 5, "official": 1}
LONG_SECONDS = 30  # of a call
ROW_KEYS = ("model", "size", "batch", "dtype")
EXAMPLE = """examples:
  python tpu_scripts/bench/few_steps.py --model tiny
  python tpu_scripts/bench/few_steps.py --model official --size 256 --pairs 2

On two cores the first takes a minute; the second takes 20 minutes, and 16 GB of memory."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the defaults of the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="tiny", help="default tiny")
    parser.add_argument("--size", type=int, help="pixels along a side; default 64 for tiny, 512 for official")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="pictures a call; default 1 and 8 for tiny, 1 for official"
    )
    parser.add_argument("--pairs", type=int, help="of calls; default 5 for tiny, 1 for official")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    parser.add_argument("--note", help="a remark for the rows, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results", help="folder of the results")
    given = parser.parse_args(argv)
    for name, defaults in (("size", SIZES), ("batch", BATCHES), ("pairs", PAIRS)):
        if getattr(given, name) is None:
            setattr(given, name, defaults[given.model])
    if given.size < 64 or given.size % 64:
        parser.error(f"--size must be a multiple of 64, got {given.size}")
    if given.pairs < 1 or min(given.batch) < 1:
        parser.error("--pairs and --batch must be at least 1")
    return given


def official(dtype: str) -> KandinskyV22CombinedPipeline:
    """A pipeline of random weights in the official shapes, and tiny's tokenizer with its smaller vocabulary."""
    small: Any = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype=dtype)
    words = small.prior_text_encoder.config
    changes = {
        "image_encoder": {"num_hidden_layers": 2},
        "text_encoder": {"vocab_size": words.vocab_size, "eos_token_id": words.eos_token_id},
    }
    networks = {}
    with tqdm(random_models.PARTS.items(), desc="random weights", unit="repository") as repositories:
        for repository, parts in repositories:
            prefix = "prior_" if repository == hub.PRIOR else ""
            for part in parts:
                networks[prefix + part] = random_models.network(repository, part, dtype, **changes.get(part, {}))
    return KandinskyV22CombinedPipeline(**small.components | networks)


class Calls:
    """The two calls on a model, for a batch.

    Args:
        size: pixels along a side.
        batch: pictures.
    """

    def __init__(self, pipe: Any, size: int, batch: int):
        self._pipe, self._prompts = pipe, [PROMPT] * batch
        self._size = {"height": size, "width": size}
        self._schedulers = {USUAL: pipe.scheduler, FEW: scheduler_named("lcm", pipe.scheduler.config)}

    def __call__(self, which: str, steps: int | None = None) -> float:
        """Run one call.

        Args:
            which: `USUAL` or `FEW`.
            steps: of both stages, for warming up; programs do not depend on it.
        Returns:
            its seconds.
        """
        usual = which == USUAL
        guidance = GUIDANCE if usual else 1.0
        self._pipe.scheduler = self._schedulers[which]
        began = time.perf_counter()
        self._pipe(
            self._prompts,
            prior_num_inference_steps=steps or (PRIOR_STEPS if usual else FEW_STEPS),
            num_inference_steps=steps or (STEPS if usual else FEW_STEPS),
            prior_guidance_scale=guidance,
            guidance_scale=guidance,
            generator=0,
            **self._size,
        )
        return time.perf_counter() - began

    def by_stage(self, which: str) -> tuple[float, float]:
        """Run the stages one after the other; seconds of the prior, and of the decoder without MoVQ."""
        usual = which == USUAL
        self._pipe.scheduler = self._schedulers[which]
        options: dict[str, Any] = {"guidance_scale": GUIDANCE if usual else 1.0, "generator": 0}
        prior_steps, steps = (PRIOR_STEPS, STEPS) if usual else (FEW_STEPS, FEW_STEPS)
        began = time.perf_counter()
        embeds = self._pipe.prior_pipe(
            self._prompts, num_inference_steps=prior_steps, output_type="np", return_dict=False, **options
        )
        after_prior = time.perf_counter()
        options |= {"num_inference_steps": steps, "output_type": "latent"}
        jax.block_until_ready(self._pipe.decoder_pipe(*embeds, **options, **self._size).images)
        return after_prior - began, time.perf_counter() - after_prior


def measured(calls: Calls, pairs: int, what: str) -> dict[str, list[float]]:
    """Seconds of each call, in turns; every other pair begins with the short one."""
    found: dict[str, list[float]] = {USUAL: [], FEW: []}
    with tqdm(total=4 + 2 * pairs, desc=what, unit="call") as bar:
        for which in (USUAL, FEW, USUAL, FEW):
            bar.set_postfix_str(f"compiling, warming up: {which}")
            calls(which, steps=2)
            bar.update()
        for pair in range(pairs):
            for which in (USUAL, FEW) if pair % 2 == 0 else (FEW, USUAL):
                bar.set_postfix_str(which)
                found[which].append(calls(which))
                bar.update()
    return found


def stages(calls: Calls, row: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of the stages, medians; of long usual calls not, because that would take as long as another pair.

    Args:
        row: with the whole calls' seconds; MoVQ, and making pictures of arrays, is what the other stages leave.
    """
    found = {}
    for which in (FEW, USUAL):
        if (whole := row[f"{which}_s"]) < LONG_SECONDS or which == FEW:
            calls.by_stage(which)  # compiles what the whole call has no program for
            runs = [calls.by_stage(which) for _ in range(repeats)]
            prior, decoder = (statistics.median(each) for each in zip(*runs, strict=True))
            parts = {"prior": prior, "decoder": decoder, "movq": whole - prior - decoder}
            found[which] = {stage: round(seconds, 4) for stage, seconds in parts.items()}
    return found


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratio of each pair: median, smallest, largest."""
    ratios = [usual / few for usual, few in zip(seconds[USUAL], seconds[FEW], strict=True)]
    return {
        "usual_s": round(statistics.median(seconds[USUAL]), 4),
        "few_s": round(statistics.median(seconds[FEW]), 4),
        "times_faster": round(statistics.median(ratios), 2),
        "smallest": round(min(ratios), 2),
        "largest": round(max(ratios), 2),
        "pairs": len(ratios),
        "seconds": {which: [round(s, 4) for s in each] for which, each in seconds.items()},
    }


def add(target: Path, settings: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a row to a file of results, complete or as before; it replaces an earlier row of the same measurement."""
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in ROW_KEYS)] + [row]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".json.part")
    scratch.write_text(json.dumps(settings | {"rows": rows}, indent=2) + "\n")
    scratch.replace(target)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | size | batch | dtype | usual, s | few, s | its prior + decoder + MoVQ, s | times faster "
        "| smallest to largest | pairs |",
        "|---|---:|---:|---|---:|---:|---|---:|---|---:|",
    ]
    for row in rows:
        parts = " + ".join(f"{seconds:.3f}" for seconds in row["by_stage_s"][FEW].values())
        lines.append(
            f"| {row['model']} | {row['size']} | {row['batch']} | {row['dtype']} | {row['usual_s']:.3f} "
            f"| {row['few_s']:.3f} | {parts} | {row['times_faster']:.1f} "
            f"| {row['smallest']:.1f} to {row['largest']:.1f} | {row['pairs']} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    given = parse(argv)
    today = datetime.date.today().isoformat()
    settings = {
        "date": today,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "guidance_scale": GUIDANCE,
        "steps": {USUAL: {"prior": PRIOR_STEPS, "decoder": STEPS}, FEW: {"prior": FEW_STEPS, "decoder": FEW_STEPS}},
    }
    pipe: Any = (
        official(given.dtype)
        if given.model == "official"
        else KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype=given.dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        what = {"model": given.model, "size": given.size, "batch": batch, "dtype": given.dtype}
        calls = Calls(pipe, given.size, batch)
        row = what | summary(measured(calls, given.pairs, f"{given.model} {given.size} x{batch}"))
        row["by_stage_s"] = stages(calls, row, given.pairs)
        row |= {"note": given.note} if given.note else {}
        rows = add(given.output / f"few-steps-{today}.json", settings, row)
    print(table(rows))


if __name__ == "__main__":
    main()
