"""Assemble the trained parts as one family, in float16: `python tpu_scripts/train_tiny/assemble.py build/emoji OUTPUT`.

The three decoders share one MoVQ, which lies in the first one's folder. The fast adapter is distilled from the first,
and fits all three: `--fast` adds it to a family that is there. Copy the result to kandinsky_jax/tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from kandinsky_jax import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    VQModel,
    load_network,
)
from kandinsky_jax.checkpoint import flat_params, hub, lora_files, preview_map, recommended_settings, zero_embed
from kandinsky_jax.checkpoint.lora_files import layers_of
from kandinsky_jax.checkpoint.manifest import MANIFEST, write_manifest

# What evaluate.py found best.
RECOMMENDED = recommended_settings.RecommendedSettings(guidance_scale=2.0, prior_guidance_scale=1.0)
# What evaluate_fast.py found best. The prior, unguided, loses nothing in 4 steps as it is.
FAST_LORA = "fast_lora.safetensors"
FAST = recommended_settings.FastSettings(
    lora=FAST_LORA,
    num_inference_steps=4,
    guidance_scale=1.0,
    scheduler="tcd",
    prior_num_inference_steps=4,
    prior_guidance_scale=1.0,
)
# The folder of a run's result, by the part of the family.
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


def assemble(runs: Path, output: Path) -> None:
    """Write the family without fast adapters."""
    for name, (run, pipeline) in RESULTS.items():
        target = output / name
        pipe = pipeline.from_pretrained(runs / run / "model", dtype="float16")
        pipe.save_pretrained(target, overwrite=True)
        if name == hub.PRIOR:
            zero_embed.store(target / "image_encoder", pipe.image_encoder.config)
        elif name == hub.DECODER:
            preview_map.store(load_network(VQModel, target / "movq", "float32"), target / "movq")
        else:
            shutil.rmtree(target / "movq")
        if name != hub.PRIOR:
            recommended_settings.write(RECOMMENDED, target)
        (target / MANIFEST).unlink()  # of one of its own; the family has one
    (output / "NOTICE").write_text(NOTICE)


def add_fast_adapter(runs: Path, output: Path) -> None:
    """Copy the fast adapter to every decoder, in float16, and recommend it."""
    unet = KandinskyV22Pipeline.from_pretrained(output / hub.DECODER, dtype="float32").unet
    opened = lora_files.open_file(lora_files.find(runs / "fast"))
    changes, _ = lora_files.read(opened, {"unet": layers_of(flat_params(unet))})
    for name in (hub.DECODER, hub.INPAINT, hub.CONTROLNET):
        lora_files.write(output / name, changes, FAST_LORA, "float16")
        recommended_settings.write(dataclasses.replace(RECOMMENDED, fast=FAST), output / name)


def main() -> None:
    """Write the family, or its fast adapter alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fast", action="store_true", help="add the fast adapter to the family in OUTPUT")
    arguments = parser.parse_args()
    (add_fast_adapter if arguments.fast else assemble)(arguments.runs, arguments.output)
    write_manifest(arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
