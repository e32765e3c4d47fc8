"""Configurations that schedulers take from each other, from files and from arrays."""

from __future__ import annotations

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kandinsky_jax
from kandinsky_jax import SchedulerError, scheduler_named
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.schedulers import NAMES, scheduler_from_config

TINY = json.loads((hub.EMBEDDED["tiny"] / hub.DECODER / "scheduler/scheduler_config.json").read_text())
BETAS = np.linspace(1e-4, 0.02, 1000)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
@pytest.mark.parametrize("name", NAMES)
def test_every_solver_takes_a_fixed_variance(name, variance):
    """Those with a variance of their own have no use for it, and get the same coefficients without it."""
    assert TINY["variance_type"] == "fixed_small"
    own = scheduler_named(name, TINY | {"variance_type": variance}).schedule(10).table
    if name != "ddpm":
        without = scheduler_named(name, {k: v for k, v in TINY.items() if k != "variance_type"}).schedule(10).table
        assert all(np.array_equal(a, b) for a, b in zip(own, without, strict=True))


def test_a_variance_that_there_is_not():
    for name in ("ddpm", "dpm++2m", "sa"):
        with pytest.raises(SchedulerError, match="variance_type='fixed_tiny' is not supported"):
            scheduler_named(name, TINY | {"variance_type": "fixed_tiny"})


@pytest.mark.parametrize(
    "betas",
    [BETAS, BETAS.tolist(), tuple(BETAS), BETAS.astype(np.float32), jnp.asarray(BETAS), torch.tensor(BETAS)],
    ids=["float64", "list", "tuple", "float32", "jax", "torch"],
)
def test_trained_betas_may_be_an_array(betas, tmp_path):
    ours = kandinsky_jax.DDPMScheduler(trained_betas=betas)
    theirs = diffusers.DDPMScheduler(trained_betas=BETAS.tolist())
    assert np.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)
    ours.save_pretrained(tmp_path)
    again = kandinsky_jax.DDPMScheduler.from_pretrained(tmp_path)
    assert again == ours
    assert hash(again) == hash(ours)
    multistep = kandinsky_jax.DPMSolverMultistepScheduler.from_config(ours.config)
    assert multistep.trained_betas == ours.trained_betas
    assert np.isfinite(multistep.schedule(10).table.matrix).all()


@pytest.mark.parametrize(
    "betas",
    [BETAS[None], BETAS[:10], "abc", 3, [0.1] * 999 + ["x"], np.full(1000, np.nan)],
    ids=["two axes", "too few", "text", "number", "a word", "not finite"],
)
def test_trained_betas_of_another_kind(betas):
    with pytest.raises(SchedulerError, match="trained_betas"):
        kandinsky_jax.DDPMScheduler(trained_betas=betas)


@pytest.mark.parametrize("steps", [10**30, 10**6, 0, -1, 2.5, True])
def test_the_number_of_training_timesteps_is_bounded(steps):
    config = {"_class_name": "UnCLIPScheduler", "num_train_timesteps": steps}
    with pytest.raises(SchedulerError, match=r"^FILE UnCLIPScheduler: num_train_timesteps must be"):
        scheduler_from_config(config, "FILE")
