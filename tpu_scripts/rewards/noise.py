"""ReNO on `tiny` with its one-step student: the first noise, changed so that CLIP's similarity rises.

    python tpu_scripts/rewards/noise.py

Writes tpu_scripts/results/noise-DATE.json and docs/rewards-noise.png.
"""

from __future__ import annotations

import argparse
import time

import common
import numpy as np

from kandinsky_jax import diffusion, rewards


def main() -> None:
    """Optimise, measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--regularization", type=float, default=0.001)
    args = parser.parse_args()
    began, pipe = time.time(), common.load()
    names = common.names(400)
    prompts = [names[i] for i in np.random.default_rng(1).permutation(len(names))[: args.names]]
    embeds = common.embeddings(pipe, prompts)
    pipe.load_fast()
    sampler = rewards.DecoderSampler.from_pipeline(
        pipe, pipe.scheduler.schedule(1), guider=diffusion.NoGuidance(), height=common.SIDE, width=common.SIDE
    )
    similarity = rewards.ClipSimilarity.from_pipeline(pipe.prior_pipe, prompts)
    config = rewards.NoiseConfig(
        iterations=args.iterations, learning_rate=args.learning_rate, regularization=args.regularization
    )
    noise = sampler.noise(0, len(prompts))
    result = rewards.optimize_noise(sampler, embeds, noise, similarity, config)
    before, after = result.rewards[0], result.rewards.max(0)
    found = {"before": common.mean_of(before), "after": common.mean_of(after), "gain": common.mean_of(after - before)}
    found["mean_reward"] = result.rewards.mean(1).tolist()
    found["mean_norm"] = result.norms.mean(1).tolist()
    print(found, flush=True)
    common.write("noise", began, {name: getattr(args, name) for name in vars(args)} | found)
    some = np.argsort(before - after)[:9]
    rows = {"before": np.asarray(sampler(noise, embeds))[some], f"{args.iterations}\niterations": result.images[some]}
    common.sheet(common.ROOT / "docs" / "rewards-noise.png", rows, [prompts[i] for i in some])


if __name__ == "__main__":
    main()
