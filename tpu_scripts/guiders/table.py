"""Guiders by scales: the share of right pictures of `tiny` and of the tests' model of shapes, with the same noise.

    python tpu_scripts/guiders/table.py build/emoji/data --weak build/guiders

generates the names of the 500 commonest emoji in 25 steps (see train_tiny/evaluate.py) and 200 captions of shapes in
50, both stages guided by the same guider and scale, with the prior's usual 25 steps; by perturbed attention and by
autoguidance the decoder alone, because they make these priors worse. Autoguidance takes the weak models that weak.py
has made. Writes tpu_scripts/results/guiders-DATE.json after every row, goes on where it was stopped, and
prints the table. Forty minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tpu_scripts" / "train_tiny")]  # the scorers

import evaluate  # noqa: E402
from evaluate_fast import Judge  # noqa: E402

from kandinsky_jax import KandinskyV22CombinedPipeline  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from tests import shapes  # noqa: E402

SEED, BATCH, CAPTIONS = 11, 25, 200
STEPS = {"tiny": 25, "shapes": 50}
SCALES = (4.0, 2.0, 8.0)  # in the order of measuring
# The length that APG cuts at is the paper's 15 for latents of 64 x 64 x 4 numbers, and as much for each number here.
APG = "apg:norm_threshold=1.9"
LAMBDAS = {2.0: 0.6, 4.0: 0.8, 8.0: 1.0}  # of CFG++, for scales of CFG
PAG = r"pag:perturbed_scale={extra},layers=down_blocks\..*"  # the middle block has 2 x 2 places
PERTURBED = {2.0: 0.25, 4.0: 0.5, 8.0: 1.0}  # scales of perturbed attention, likewise
NONE = {"guidance_scale": 1.0}


class Case(dict):
    """A row: the decoder's and the prior's guiders, scales and intervals."""

    @property
    def name(self) -> str:
        return json.dumps(self, sort_keys=True)


def case(label: str, scale: float, decoder: dict[str, Any], prior: dict[str, Any] | None = None) -> Case:
    """A row whose stages have the same settings, but where the prior has its own."""
    return Case(label=label, scale=scale, decoder=decoder, prior=decoder if prior is None else prior)


def cases(weak: Path | None, model: str) -> list[Case]:
    """The table's rows for a model."""
    plain = [case("none", 1.0, NONE)]
    for scale in SCALES:
        cfg = {"guidance_scale": scale}
        plain += [
            case("cfg", scale, cfg),
            case("rescaled-cfg", scale, cfg | {"guider": "rescaled-cfg"}),
            case("apg", scale, cfg | {"guider": APG}),
            case("cfg++", scale, {"guidance_scale": LAMBDAS[scale], "guider": "cfg++"}),
            case("interval", scale, cfg | {"guidance_interval": (0.2, 0.8)}),
            case("pag", scale, NONE | {"guider": PAG.format(extra=PERTURBED[scale])}, NONE),
        ]
        if weak is not None:
            weaker = cfg | {"guider": f"autoguidance:model={weak / model / 'decoder' / 'model'}"}
            plain.append(case("autoguidance", scale, weaker, NONE))
    return plain


class Model:
    """A model whose pictures can be judged."""

    def __init__(self, pipe: Any, texts: Sequence[str], batch: int, steps: int, seeds: Callable[[int], Any]):
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.texts, self.batch, self.steps, self.seeds = pipe, list(texts), batch, steps, seeds
        self._embeds: dict[str, list[tuple[Any, Any]]] = {}

    def generate(self, row: Case) -> np.ndarray:
        """Generate the pictures of a row, float32 `[N, 64, 64, 3]` in 0..1; embeddings are kept for other rows."""
        size, firsts = {"height": evaluate.SIDE, "width": evaluate.SIDE}, range(0, len(self.texts), self.batch)
        key = json.dumps(row["prior"], sort_keys=True)
        if key not in self._embeds:
            self._embeds[key] = [
                self.pipe.prior_pipe(self._some(i), generator=self.seeds(i), return_dict=False, **row["prior"])
                for i in firsts
            ]
        found = []
        for i, embeds in zip(tqdm(firsts, desc=row["label"], unit="batch"), self._embeds[key], strict=True):
            call = {"generator": self.seeds(i), "num_inference_steps": self.steps, "output_type": "np"}
            found.append(self.pipe.decoder_pipe(*embeds, **call | size | row["decoder"]).images)
        return np.concatenate(found)[: len(self.texts)]

    def _some(self, first: int) -> list[str]:
        some = self.texts[first : first + self.batch]
        return some + [some[-1]] * (self.batch - len(some))  # one shape, one program


def tiny(data: Path, count: int | None) -> tuple[Model, Callable[[np.ndarray], float]]:
    """The embedded model and its judge."""
    there = evaluate.known(data)
    asked = [(code, text) for code in evaluate.common(there, 500) for text in there.captions[code]][:count]
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    judge = Judge(pipe, there, asked)
    seeds = list(range(evaluate.BATCH))
    model = Model(pipe, [text for _, text in asked], evaluate.BATCH, STEPS["tiny"], lambda first: seeds)
    return model, lambda x: float(judge.right((x * 255).round().astype(np.uint8)).mean())


def coloured_shapes(count: int) -> tuple[Model, Callable[[np.ndarray], float]]:
    """The tests' model and its judge."""
    asked = shapes.captions(count, seed=SEED)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(ROOT / "tests" / "shapes_model", dtype="float32")
    model = Model(pipe, [one.text for one in asked], BATCH, STEPS["shapes"], lambda first: first)
    truths = [one.truth for one in asked]
    return model, lambda x: shapes.rates(map(shapes.classify, x), truths)["all"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The shares in percent, a line for each guider, a column for each model and scale."""
    labels, models = dict.fromkeys(row["label"] for row in rows), dict.fromkeys(row["model"] for row in rows)
    scales = sorted({row["scale"] for row in rows} - {1.0})
    right = {(row["label"], row["model"], row["scale"]): row["right"] for row in rows}
    lines = [
        "| guider | " + " | ".join(f"{model}, {scale:g}" for model in models for scale in scales) + " |",
        "|---|" + "---:|" * (len(models) * len(scales)),
    ]
    for label in labels:
        cells = [right.get((label, m, s), right.get((label, m, 1.0))) for m in models for s in scales]
        lines.append(f"| {label} | " + " | ".join("" if x is None else f"{100 * x:.1f}" for x in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, write after every row, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("--weak", type=Path, help="the folder that weak.py has written; default: no autoguidance")
    parser.add_argument("--names", type=int, help="of emoji; default: all 782")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"of shapes, default {CAPTIONS}")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS), help="default: both")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    given = parser.parse_args()
    target = given.output / f"guiders-{datetime.date.today().isoformat()}.json"
    counts = {"tiny": given.names, "shapes": given.captions}
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"steps": STEPS, "rows": []}
    for name in given.models:
        measured = {row["case"] for row in found["rows"] if row["model"] == name}
        missing = [row for row in cases(given.weak, name) if row.name not in measured]
        if not missing:
            continue
        model, rate = tiny(given.data, given.names) if name == "tiny" else coloured_shapes(given.captions)
        for row in missing:
            right = round(rate(model.generate(row)), 4)
            line = {"model": name, "label": row["label"], "scale": row["scale"], "right": right, "case": row.name}
            found["rows"].append(line | {"pictures": len(model.texts)})
            found["counts"] = counts
            replace_file(target, (json.dumps(found, indent=1) + "\n").encode())
            print(name, row["label"], row["scale"], right, flush=True)
    print(table(found["rows"]), target, sep="\n")


if __name__ == "__main__":
    main()
