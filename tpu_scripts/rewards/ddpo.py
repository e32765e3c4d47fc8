"""DDPO on `tiny`: a LoRA whose pictures are smaller JPEG files, a reward without a gradient; three seeds.

    python tpu_scripts/rewards/ddpo.py

Samples in few steps and without guidance, which is quicker. Writes tpu_scripts/results/ddpo-DATE.json and
docs/rewards-ddpo.png.
"""

from __future__ import annotations

import argparse
import time

import common
import numpy as np

from kandinsky_jax import rewards
from kandinsky_jax.lora import LoraConfig


def main() -> None:
    """Train with each seed, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples-per-epoch", type=int, default=256)
    parser.add_argument("--inner-epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--clip-range", type=float, default=1e-2)
    args = parser.parse_args()
    began, pipe = time.time(), common.load()
    names = common.names(200)
    prompts = [names[i] for i in np.random.default_rng(0).permutation(len(names))[: args.prompts]]
    sampler, embeds = common.sampler(pipe, eta=1.0, steps=5, scale=1.0), common.embeddings(pipe, prompts)
    runs, rows = {}, {"before": sampler.generate(embeds, seed=1, quiet=True)}
    for seed in range(args.seeds):
        config = rewards.DDPOConfig(
            epochs=args.epochs,
            samples_per_epoch=args.samples_per_epoch,
            sample_batch_size=32,
            train_batch_size=64,
            inner_epochs=args.inner_epochs,
            buffer_size=args.samples_per_epoch // args.prompts,
            learning_rate=args.learning_rate,
            clip_range=args.clip_range,
            weight_decay=0.0,
            lora=LoraConfig(rank=8),
            seed=seed,
        )
        trained = rewards.train_ddpo(sampler, embeds, rewards.jpeg_compressibility, config)
        first, last = trained.history[0], trained.history[-1]
        gain = last["reward"] - first["reward"]
        error = float(np.hypot(first["standard_error"], last["standard_error"]))
        runs[f"seed {seed}"] = {"gain": gain, "standard_error": error, "history": trained.history}
        print(f"seed {seed}: gain {gain:.4f} kB, {gain / error:.1f} standard errors", flush=True)
        if seed == 0:
            rows[f"epoch {args.epochs}"] = sampler.with_lora(trained.changes).generate(embeds, seed=1, quiet=True)
    options = {name: getattr(args, name) for name in vars(args)}
    common.write("ddpo", began, {**options, **runs})
    common.sheet(common.ROOT / "docs" / "rewards-ddpo.png", rows, prompts)


if __name__ == "__main__":
    main()
