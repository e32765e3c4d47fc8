"""Members of diffusers' schedulers exist, or say what to write instead."""

from __future__ import annotations

import copy
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch

import kandinsky_jax
from kandinsky_jax import CheckpointError, SchedulerError
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.schedulers import SCHEDULERS
from tests.conftest import SHAPES_MODEL

DECODER = SHAPES_MODEL / hub.DECODER


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_public_member_is_there_or_named(name):
    ours, theirs = SCHEDULERS[name](), getattr(diffusers, name)()
    for member in {*dir(theirs), *vars(theirs)}:
        if member.startswith("_") or hasattr(ours, member):
            continue
        with pytest.raises(AttributeError, match=rf"^{name} has no '{member}': [a-z].{{20,250}}$"):
            getattr(ours, member)
    assert ours.order == getattr(theirs, "order", 1)
    assert len(ours) == theirs.config.num_train_timesteps == 1000
    assert pickle.loads(pickle.dumps(ours)) == ours
    with pytest.raises(AttributeError, match=f"^{name} has no 'anything'$"):
        _ = ours.anything


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("UnCLIPScheduler", "IPNDMScheduler")])
def test_the_forward_process_is_there_as_arrays(name):
    config = {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.1}
    if hasattr(SCHEDULERS[name](), "rescale_betas_zero_snr"):
        config["rescale_betas_zero_snr"] = True
    ours, theirs = SCHEDULERS[name](**config), getattr(diffusers, name)(**config)
    np.testing.assert_allclose(ours.betas, theirs.betas, atol=1e-6)
    np.testing.assert_allclose(ours.alphas, theirs.alphas, atol=1e-6)
    last = -1 if config.get("rescale_betas_zero_snr") else None  # which the reference makes 2^-24 in some of them
    np.testing.assert_allclose(ours.alphas_cumprod[:last], theirs.alphas_cumprod[:last], rtol=3e-5)
    known = {cls.__name__ for cls in ours.compatibles}
    assert ours.has_compatibles
    assert {cls.__name__ for cls in theirs.compatibles} & SCHEDULERS.keys() <= known


def test_noise_is_added_to_tensors_of_torch():
    picture, noise = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    times = torch.tensor([3, 700])
    ours, theirs = kandinsky_jax.DDPMScheduler(), diffusers.DDPMScheduler()
    for method in ("add_noise", "get_velocity"):
        wanted = getattr(theirs, method)(picture, noise, times).detach().numpy()
        np.testing.assert_allclose(getattr(ours, method)(picture, noise, times), wanted, atol=1e-6)
        half = getattr(ours, method)(picture.bfloat16(), noise.bfloat16(), times)
        np.testing.assert_allclose(half, wanted, atol=0.05)


def test_configurations_as_text_and_from_a_model(tmp_path):
    scheduler = kandinsky_jax.DDPMScheduler.from_pretrained(DECODER, subfolder="scheduler")
    wanted = json.loads((DECODER / "scheduler/scheduler_config.json").read_text())
    assert kandinsky_jax.DDPMScheduler.load_config(DECODER, subfolder="scheduler") == wanted
    scheduler.to_json_file(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(scheduler.to_json_string())
    assert diffusers.DDPMScheduler.from_config(json.loads(scheduler.to_json_string())).config.beta_end == 0.012
    again = kandinsky_jax.DDPMScheduler.from_pretrained(f"tiny/{hub.DECODER}", "scheduler", local_files_only=True)
    assert again.beta_start == 0.00085
    changed, unused = kandinsky_jax.DDPMScheduler.from_pretrained(
        DECODER, subfolder="scheduler", return_unused_kwargs=True, beta_end=0.02, colour="red"
    )
    assert (changed.beta_end, unused) == (0.02, {"colour": "red"})
    with pytest.raises(SchedulerError, match="has no field 'colour'"):
        kandinsky_jax.DDPMScheduler.from_pretrained(DECODER, subfolder="scheduler", colour="red")
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is missing"):
        kandinsky_jax.DDPMScheduler.from_pretrained(DECODER)
    with pytest.raises(CheckpointError, match="not a folder here and no Hub repository"):
        kandinsky_jax.DDPMScheduler.from_pretrained("no such/place/here")
    with pytest.raises(ValueError, match="subfolder must lie within the model"):
        kandinsky_jax.DDPMScheduler.from_pretrained(DECODER / "unet", subfolder="../scheduler")
    (tmp_path / "scheduler_config.json").write_text('{"beta_end": "high"}')
    with pytest.raises(SchedulerError, match=rf"^{tmp_path}/scheduler_config.json:? .*beta_end"):
        kandinsky_jax.DDPMScheduler.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="hf upload"):
        scheduler.save_pretrained(tmp_path, push_to_hub=True)


def test_a_configuration_stays_as_it_is():
    """A change that nothing would see is refused, as diffusers' FrozenDict refuses it."""
    scheduler = kandinsky_jax.DDPMScheduler()
    config = scheduler.config
    assert config._class_name == config["_class_name"] == "DDPMScheduler"
    changes = [
        lambda: config.update(eta=1),
        lambda: config.pop("beta_end"),
        lambda: config.__setitem__("beta_end", 1),
        lambda: setattr(config, "beta_end", 1),
        lambda: config.setdefault("other", 1),
        lambda: config.__delitem__("beta_end"),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="a configuration is immutable: make another"):
            change()
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert again == config == scheduler.config
        assert again.beta_end == config.beta_end
    assert kandinsky_jax.DDIMScheduler.from_config(config).beta_end == config.beta_end


@pytest.mark.parametrize("given", [None, 5, "tiny", [], {1: 2}], ids=str)
@pytest.mark.parametrize("cls", [kandinsky_jax.DDPMScheduler, kandinsky_jax.UNet2DConditionModel])
def test_what_is_no_configuration(cls, given):
    with pytest.raises((SchedulerError, kandinsky_jax.ConfigError), match="takes a configuration as a dict"):
        cls.from_config(given)


@pytest.mark.parametrize("value", [{1}, object()], ids=["set", "object"])
def test_what_json_cannot_hold(value, tmp_path):
    with pytest.warns(UserWarning, match="no scheduler knows"):
        scheduler = kandinsky_jax.DDPMScheduler.from_config({"x": value})
    with pytest.raises(SchedulerError, match="the configuration of DDPMScheduler cannot be written as JSON"):
        scheduler.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "subfolder", "error", "says"),
    [
        (
            "tiny",
            "scheduler",
            CheckpointError,
            f"tiny is a family of models: give .*{hub.DECODER} or .*{hub.PRIOR}",
        ),
        ("tiny/nope", "scheduler", CheckpointError, f"tiny has {hub.PRIOR}, "),
        ("tiny/..", "scheduler", CheckpointError, f"tiny has {hub.PRIOR}, "),
        (f"tiny/{hub.DECODER}/unet", "scheduler", CheckpointError, "has no folder scheduler; it has none"),
        (None, None, TypeError, "a component is named by a string or a path, got None"),
        (b"tiny", None, TypeError, "a component is named by a string or a path, got b'tiny'"),
        (DECODER, 5, TypeError, "subfolder must be a string, got 5"),
    ],
)
@pytest.mark.parametrize("cls", [kandinsky_jax.DDPMScheduler, kandinsky_jax.UNet2DConditionModel])
def test_components_that_are_not_there(cls, name, subfolder, error, says):
    for load in (cls.from_pretrained, cls.load_config):
        with pytest.raises(error, match=says):
            load(name, subfolder=subfolder)


@pytest.mark.parametrize(
    "cls",
    [kandinsky_jax.DDPMScheduler, pytest.param(kandinsky_jax.UNet2DConditionModel, marks=pytest.mark.slow)],
)
def test_arguments_without_use_come_back(cls):
    where = {"subfolder": "scheduler" if "Scheduler" in cls.__name__ else "unet"}
    config, unused = cls.load_config(DECODER, **where, return_unused_kwargs=True, colour="red")
    assert (config, unused) == (cls.load_config(DECODER, **where), {"colour": "red"})
    with pytest.raises(TypeError, match=r"load_config has no argument .*colour.*; it takes cache_dir, "):
        cls.load_config(DECODER, **where, colour="red")
    made, unused = cls.from_config(config, return_unused_kwargs=True, colour="red")
    assert isinstance(made, cls)
    assert unused == {"colour": "red"}
