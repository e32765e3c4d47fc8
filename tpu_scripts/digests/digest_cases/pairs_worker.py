"""Answers each name of a call on standard input with its seconds: on the clock, and of the processor."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from digest_cases import inputs, priors
from digest_cases.modes import GUIDED, call

STEPS = {"num_inference_steps": 10}
REPEATS = 3  # of a call, which are timed together


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name: see `digest_cases.pairs.WARM`."""
    four = {"num_images_per_prompt": 4}
    whole = functools.partial(inputs.pipeline, "KandinskyV22CombinedPipeline", inputs.TINY)
    photo = {"image": inputs.picture(), "strength": 1.0}
    hole = {"image": inputs.picture(), "mask_image": inputs.mask()}

    def embed(**changes: Any) -> Any:
        pipe = inputs.pipeline(priors.PRIOR, inputs.TINY)
        return pipe(inputs.PROMPTS[0], num_inference_steps=25, guidance_scale=2.0, generator=0, **changes)

    return {
        "text2img": lambda: call(whole(), **GUIDED, **STEPS),
        "text2img, four images": lambda: call(whole(), **GUIDED, **STEPS, **four),
        "img2img": lambda: call(
            inputs.pipeline("KandinskyV22Img2ImgCombinedPipeline", inputs.TINY), **GUIDED, **STEPS, **photo
        ),
        "inpaint decoder": lambda: call(
            inputs.pipeline("KandinskyV22InpaintPipeline", "shapes"), **GUIDED, **STEPS, **hole
        ),
        "prior": embed,
        "prior, four images": functools.partial(embed, **four),
    }


def main() -> None:
    """Answer until standard input ends."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    known = calls()
    for line in sys.stdin:
        run = known[line.strip()]
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(REPEATS):
            run()
        answers.write(json.dumps([time.perf_counter() - clock, time.process_time() - processor]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
