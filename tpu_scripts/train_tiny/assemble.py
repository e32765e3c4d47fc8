"""Assemble the trained parts as one family, in float16: `python tpu_scripts/train_tiny/assemble.py build/emoji OUTPUT`.

The three decoders share one MoVQ, which lies in the first one's folder. Copy the result to kandinsky_jax/tiny.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from kandinsky_jax import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.checkpoint import hub, recommended_settings, zero_embed
from kandinsky_jax.checkpoint.manifest import MANIFEST, write_manifest

# The folder of a run's result, by the part of the family.
# What evaluate.py found best.
RECOMMENDED = recommended_settings.RecommendedSettings(guidance_scale=2.0, prior_guidance_scale=1.0)
RESULTS = {
    hub.PRIOR: ("prior", KandinskyV22PriorPipeline),
    hub.DECODER: ("decoder", KandinskyV22Pipeline),
    hub.INPAINT: ("inpaint", KandinskyV22InpaintPipeline),
    hub.CONTROLNET: ("depth", KandinskyV22ControlnetPipeline),
}
NOTICE = """The pictures that this model was trained on are Noto Emoji (https://github.com/googlefonts/noto-emoji),
Copyright 2013 Google LLC, licensed under the Apache License, Version 2.0. Their names and keywords are those of
the npm package emoji-datasource-google 16.0.0 (https://github.com/iamcal/emoji-data), Copyright (c) 2013
Cal Henderson, under the MIT License.
"""


def main() -> None:
    """Write the family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    for name, (run, pipeline) in RESULTS.items():
        target = arguments.output / name
        pipe = pipeline.from_pretrained(arguments.runs / run / "model", dtype="float16")
        pipe.save_pretrained(target, overwrite=True)
        if name == hub.PRIOR:
            zero_embed.store(target / "image_encoder", pipe.image_encoder.config)
        elif name != hub.DECODER:
            shutil.rmtree(target / "movq")
        if name != hub.PRIOR:
            recommended_settings.write(RECOMMENDED, target)
        (target / MANIFEST).unlink()  # of one of its own; the family has one
    (arguments.output / "NOTICE").write_text(NOTICE)
    write_manifest(arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
