"""The code of docs/rewards.md runs, on small networks instead of `tiny`: the examples run it on that."""

from __future__ import annotations

import re
import types
from pathlib import Path

import numpy as np
import pytest

from kandinsky_jax import diffusion, rewards
from kandinsky_jax.training.config import load
from tests.rewards import small

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup, *blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    assert "rewards.DecoderSampler.from_pipeline" in setup

    def from_pipeline(pipe, *arguments, **options):
        return small.sampler(1, 0.0, diffusion.NoGuidance())

    clip = types.SimpleNamespace(from_pipeline=lambda pipe, names: small.redness)
    scheduler = types.SimpleNamespace(schedule=lambda steps: None)
    pipe = types.SimpleNamespace(load_fast=dict, prior_pipe=None, scheduler=scheduler)
    stand_ins = {"DecoderSampler": types.SimpleNamespace(from_pipeline=from_pipeline), "ClipSimilarity": clip}
    namespace = types.SimpleNamespace(**{**vars(rewards), **stand_ins})
    made = {"sampler": small.sampler(), "embeds": small.embeds(4), "names": ["a"] * 4}
    made |= {"rewards": namespace, "diffusion": diffusion, "pipe": pipe}
    fewer = {"updates=100": "updates=2", "iterations=50": "iterations=2"}
    fewer |= {"epochs=6": "epochs=1", "samples_per_epoch=128": "samples_per_epoch=32"}
    for block in blocks:
        for long, short in fewer.items():
            block = block.replace(long, short)
        exec(compile(block, "rewards.md", "exec"), made)
    assert made["best"].shape == (4, small.SIDE, small.SIDE, 3)
    assert np.isfinite(made["trained"].history[0]["reward"])
    assert (tmp_path / "reward_lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_configuration_of_the_page_is_valid(tmp_path):
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "pairs.toml").write_text(text)
    assert load(tmp_path / "pairs.toml").dpo.lora
