"""DRaFT on `tiny`: a LoRA that raises CLIP's similarity, measured on names that its training did not see.

    python tpu_scripts/rewards/draft.py

Trains on the names of the commonest emoji but for 200, on which it measures, with the same embeddings and noise before
and after. Writes tpu_scripts/results/draft-DATE.json and docs/rewards-draft.png.
"""

from __future__ import annotations

import argparse
import time

import common
import numpy as np

from kandinsky_jax import rewards
from kandinsky_jax.lora import LoraConfig

SHOWN = 9


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--unseen", type=int, default=200)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--gradient-steps", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    began, pipe = time.time(), common.load()
    names = common.names()
    order = np.random.default_rng(0).permutation(len(names))
    unseen, seen = ([names[i] for i in part] for part in np.split(order, [args.unseen]))
    sampler = common.sampler(pipe)
    embeds = {"seen": common.embeddings(pipe, seen), "unseen": common.embeddings(pipe, unseen)}
    similarity = {
        part: rewards.ClipSimilarity.from_pipeline(pipe.prior_pipe, prompts)
        for part, prompts in (("seen", seen), ("unseen", unseen))
    }
    config = rewards.DraftConfig(
        updates=args.updates,
        batch_size=16,
        gradient_steps=args.gradient_steps,
        learning_rate=args.learning_rate,
        lora=LoraConfig(rank=8),
    )
    print(f"{time.time() - began:.0f} s before training", flush=True)
    trained = rewards.train_draft(sampler, embeds["seen"], similarity["seen"], config)
    print(f"{time.time() - began:.0f} s after training", flush=True)
    changed = sampler.with_lora(trained.changes, config.lora.scale)
    found, pictures = {}, {}
    for part, own in embeds.items():
        pictures[part] = [s.generate(own, seed=1, batch_size=50, quiet=True) for s in (sampler, changed)]
        before, after = (np.asarray(similarity[part](images)) for images in pictures[part])
        found[part] = {"before": common.mean_of(before), "after": common.mean_of(after)}
        found[part]["gain"] = common.mean_of(after - before)
        found[part]["pictures"] = len(own)
        print(part, found[part], flush=True)
    options = {name: getattr(args, name) for name in vars(args)}
    common.write("draft", began, {**options, **found, "history": trained.history[:: max(1, args.updates // 30)]})
    gains = np.asarray(similarity["unseen"](pictures["unseen"][1])) - np.asarray(
        similarity["unseen"](pictures["unseen"][0])
    )
    some = np.argsort(gains)[:: -len(gains) // SHOWN][:SHOWN]  # from the largest gain to the least
    rows = dict(zip(("before", "after"), (images[some] for images in pictures["unseen"]), strict=True))
    common.sheet(common.ROOT / "docs" / "rewards-draft.png", rows, [unseen[i] for i in some])


if __name__ == "__main__":
    main()
