"""Losses, gradients and steps compared with PyTorch twins of the reference's training scripts."""

from __future__ import annotations

import copy

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import compute_snr

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import tensor_names
from kandinsky_jax.diffusion import Network
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.training.losses import decoder_loss, prior_loss
from kandinsky_jax.training.step import OptimizerConfig, Trainer
from tests.conftest import note

BATCH = 4
TARGETS = {
    "decoder": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    "prior": ["to_q", "to_k", "to_v", "to_out.0"],
}


def batch_of(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents or embeddings of about the networks' own spread, captions that end at different places."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = {"image_embeds": normal(BATCH, 64), "timesteps": rng.integers(0, 1000, BATCH)}
    if kind == "decoder":
        return batch | {"latents": normal(BATCH, 8, 8, 4), "noise": normal(BATCH, 8, 8, 4)}
    mask = np.arange(77) < rng.integers(5, 20, (BATCH, 1))
    text = {"prompt_embeds": normal(BATCH, 64), "text_encoder_hidden_states": normal(BATCH, 77, 64), "text_mask": mask}
    return batch | text | {"noise": normal(BATCH, 64)}


class Twin:
    """The reference's step, on a copy of its network; with `rank`, of LoRA layers only."""

    def __init__(self, reference, kind: str, rank: int | None = None):
        prior_pipe, decoder_pipe = reference
        self.kind = kind
        network = decoder_pipe.unet if kind == "decoder" else prior_pipe.prior
        self.network = copy.deepcopy(network).train()
        if kind == "decoder":
            self.scheduler = diffusers.DDPMScheduler.from_config(decoder_pipe.scheduler.config)
        else:
            self.scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        if rank is not None:
            self.network.requires_grad_(False)
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[kind])
            self.network.add_adapter(config)
            torch.manual_seed(0)
            for name, parameter in self.network.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.02 * torch.randn_like(parameter)

    def loss(self, batch, gamma: float | None) -> torch.Tensor:
        """As in train_text_to_image_decoder.py and train_text_to_image_prior.py."""
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
        embeds, noise, timesteps = given["image_embeds"], given["noise"], given["timesteps"]
        if self.kind == "decoder":
            latents, noise = (given[name].permute(0, 3, 1, 2) for name in ("latents", "noise"))
            noisy, target = self.scheduler.add_noise(latents, noise, timesteps), noise
            output = self.network(noisy, timesteps, None, added_cond_kwargs={"image_embeds": embeds}).sample[:, :4]
        else:
            target = (embeds - self.network.clip_mean.detach()) / self.network.clip_std.detach()
            output = self.network(
                self.scheduler.add_noise(target, noise, timesteps),
                timestep=timesteps,
                proj_embedding=given["prompt_embeds"],
                encoder_hidden_states=given["text_encoder_hidden_states"],
                attention_mask=given["text_mask"],
            ).predicted_image_embedding
        error = torch.nn.functional.mse_loss(output, target, reduction="none")
        if gamma is None:
            return error.mean()
        snr = compute_snr(self.scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        if self.scheduler.config.prediction_type == "epsilon":
            weights = weights / snr
        return (error.mean(dim=list(range(1, error.ndim))) * weights).mean()

    def trained(self) -> dict[str, torch.Tensor]:
        """What has a gradient, by PyTorch's names."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad and p.grad is not None}


class Ours:
    """The same loss of ours, with its parameters."""

    def __init__(self, shapes_pipe, kind: str, gamma: float | None):
        module = shapes_pipe.unet if kind == "decoder" else shapes_pipe.prior_prior
        self.kind, self.gamma = kind, gamma
        self.network, self.params = Network.split(module)
        if kind == "decoder":
            self.alphas = jnp.asarray(shapes_pipe.scheduler.alphas_cumprod, jnp.float32)
        else:
            scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
            self.alphas = jnp.asarray(scheduler.alphas_cumprod.numpy())

    def loss(self, params, batch) -> jax.Array:
        function = decoder_loss if self.kind == "decoder" else prior_loss
        return function(self.network, params, **batch, alphas_cumprod=self.alphas, snr_gamma=self.gamma)


def torch_arrays(tree) -> dict[str, np.ndarray]:
    """Our parameters or gradients in PyTorch's names and order of axes."""
    return {
        tensor_names.torch_name(name): tensor_names.to_torch(name, np.asarray(leaf))
        for name, leaf in lora.flat(tree).items()
    }


def close(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor], what: str, bound: float) -> None:
    """max |d| / std of each, at most the bound."""
    spread = np.median([value.detach().numpy().std() for value in theirs.values()])
    assert theirs
    for name, value in theirs.items():
        wanted = value.detach().numpy()
        if name.endswith("attn1.to_k.bias"):
            # Shifts all of the prior's keys, which softmax does not see: zero, but for rounding.
            assert max(np.abs(ours[name]).max(), np.abs(wanted).max()) <= 1e-5 * spread
            continue
        error = np.abs(ours[name] - wanted).max() / wanted.std()
        assert note(error, f"{what}, max|d| / std") <= bound, name


@pytest.mark.parametrize(
    ("kind", "gamma"),
    [
        ("prior", 5.0),
        pytest.param("decoder", 5.0, marks=pytest.mark.slow),
        pytest.param("prior", None, marks=pytest.mark.slow),
        pytest.param("decoder", None, marks=pytest.mark.campaign),
    ],
)
def test_loss_and_gradients(shapes_pipe, reference, kind, gamma):
    twin, own, batch = Twin(reference, kind), Ours(shapes_pipe, kind, gamma), batch_of(kind)
    wanted = twin.loss(batch, gamma)
    wanted.backward()
    value, gradients = jax.jit(jax.value_and_grad(own.loss))(own.params, batch)
    assert note(abs(float(value) / wanted.item() - 1), "loss, relative") <= 1e-5
    found = torch_arrays(gradients)
    close(found, {name: p.grad for name, p in twin.trained().items()}, "gradients", 1e-3)
    without = found.keys() - twin.trained().keys()  # what PyTorch has no gradient of, has none here
    assert all(not found[name].any() for name in without), without


def lora_of(twin: Twin) -> dict[str, dict[str, np.ndarray]]:
    """The twin's LoRA layers as ours."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, parameter in twin.network.named_parameters():
        if ".lora_" in name:
            layer, half = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            found.setdefault(layer, {})[half] = parameter.detach().numpy().copy()
    return found


def by_peft_name(tree) -> dict[str, np.ndarray]:
    return {f"{n}.lora_{half}.default.weight": np.asarray(x) for n, pair in tree.items() for half, x in pair.items()}


@pytest.mark.parametrize(
    ("kind", "gamma"),
    [
        pytest.param("prior", 5.0, marks=pytest.mark.slow),
        pytest.param("decoder", None, marks=pytest.mark.slow),
        pytest.param("prior", None, marks=pytest.mark.campaign),
        pytest.param("decoder", 5.0, marks=pytest.mark.campaign),
    ],
)
def test_loss_and_gradients_of_lora(shapes_pipe, reference, kind, gamma):
    twin, own, batch = Twin(reference, kind, rank=4), Ours(shapes_pipe, kind, gamma), batch_of(kind, 1)
    changes = lora_of(twin)
    config = LoraConfig(rank=4, alpha=8)
    assert lora.init(own.params, config, jax.random.key(0)).keys() == changes.keys()  # the same layers
    wanted = twin.loss(batch, gamma)
    wanted.backward()

    def loss(changes):
        return own.loss(lora.merged(own.params, changes, config.scale), batch)

    value, gradients = jax.jit(jax.value_and_grad(loss))(changes)
    assert note(abs(float(value) / wanted.item() - 1), "loss, relative") <= 1e-5
    close(by_peft_name(gradients), {name: p.grad for name, p in twin.trained().items()}, "gradients", 1e-3)


@pytest.mark.parametrize(
    ("kind", "with_lora"),
    [
        pytest.param("prior", False, marks=pytest.mark.slow),
        pytest.param("decoder", True, marks=pytest.mark.slow),
        pytest.param("prior", True, marks=pytest.mark.campaign),
        pytest.param("decoder", False, marks=pytest.mark.campaign),
    ],
)
def test_weights_after_twenty_steps(shapes_pipe, reference, kind, with_lora):
    """Agree within 1e-3 of how far they have come; in the mean over a tensor, since AdamW makes steps of one size
    even where a gradient is nothing but rounding."""
    twin, own = Twin(reference, kind, rank=4 if with_lora else None), Ours(shapes_pipe, kind, 5.0)
    rate = {"learning_rate": 1e-4, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-6}
    optimizer = torch.optim.AdamW(
        [p for p in twin.network.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-2, eps=1e-6
    )
    config = LoraConfig(rank=4, alpha=8)

    def loss(trained, batch):
        return own.loss(lora.merged(own.params, trained, config.scale) if with_lora else trained, batch)

    trainer = Trainer(loss, OptimizerConfig(max_grad_norm=1.0, **rate))
    state = trainer.init(lora_of(twin) if with_lora else own.params)
    before = {name: p.detach().numpy().copy() for name, p in twin.network.named_parameters() if p.requires_grad}
    for i in range(20):
        batch = batch_of(kind, 100 + i)
        wanted = twin.loss(batch, 5.0)
        optimizer.zero_grad()
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(twin.network.parameters(), 1.0)
        optimizer.step()
        state, metrics = trainer.step(state, batch, jax.random.key(0))
        assert abs(float(metrics["loss"]) / wanted.item() - 1) <= 1e-4
    found = by_peft_name(state.params) if with_lora else torch_arrays(state.params)
    moved, apart = 0.0, 0.0
    for name, parameter in twin.network.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.detach().numpy()
            moved += np.square(wanted - before[name]).sum()
            apart += np.square(found[name] - wanted).sum()
    assert moved > 0
    assert note((apart / moved) ** 0.5, "weights after 20 steps, |d| / |update|") <= 1e-3


# Ours alone -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(shapes_pipe):
    """(settings) -> the prior's parameters, its state after one step, and the step's metrics."""
    own, batch = Ours(shapes_pipe, "prior", None), batch_of("prior")

    def step(**settings):
        rates = {"adam_weight_decay": 0.5, "learning_rate": 0.1, "max_grad_norm": None}
        trainer = Trainer(own.loss, OptimizerConfig(**rates, **settings))
        state, metrics = trainer.step(trainer.init(own.params), batch, jax.random.key(0))
        return own.params, state, {name: float(value) for name, value in metrics.items()}

    return step


@pytest.fixture(scope="module")
def plain(stepped):
    return stepped()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_the_batch(stepped, plain, parts):
    _, state, found = stepped(gradient_accumulation_steps=parts)
    assert int(state.step) == 1
    for name in ("loss", "gradient_norm"):
        assert found[name] == pytest.approx(plain[2][name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "least", "most"), [({"remat": True}, 0, 1e-6), ({"dtype": "bfloat16"}, 1e-8, 0.05)]
)
def test_remat_changes_nothing_and_bfloat16_little(stepped, plain, settings, least, most):
    _, state, found = stepped(**settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert least <= abs(found["loss"] / plain[2]["loss"] - 1) <= most


@pytest.mark.slow
def test_statistics_are_not_trained(plain):
    before, state, _ = plain
    assert all(np.array_equal(state.params[name], before[name]) for name in ("clip_mean", "clip_std"))
    assert not np.array_equal(state.params["prd_embedding"], before["prd_embedding"])


def test_the_average_is_the_references(shapes_pipe):
    """diffusers' EMAModel, fed with our weights."""
    from diffusers.training_utils import EMAModel

    def loss(params, batch):
        return jnp.square(params["a"]["weight"] - batch).mean()

    trainer = Trainer(loss, OptimizerConfig(learning_rate=0.1, ema_decay=0.95))
    state = trainer.init({"a": {"weight": jnp.arange(6.0).reshape(2, 3)}})
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    average = EMAModel([weight], decay=0.95)
    for i in range(30):
        state, _ = trainer.step(state, jnp.full((1, 3), float(i)), jax.random.key(0))
        weight.data = torch.from_numpy(np.asarray(state.params["a"]["weight"]).copy())
        average.step([weight])
    assert np.allclose(state.ema["a"]["weight"], average.shadow_params[0], rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_that_are_not_finite_change_no_weight(clip):
    """The root of 0 is finite, its slope is not."""
    settings = OptimizerConfig(learning_rate=0.1, max_grad_norm=clip, ema_decay=0.5)
    trainer = Trainer(lambda params, batch: jnp.sqrt(params["weight"] * batch).mean(), settings)
    before = trainer.init({"weight": jnp.arange(1.0, 3.0)})
    state, _ = trainer.step(before, jnp.ones((1, 2)), jax.random.key(0))
    kept = jax.tree.map(np.array, state)
    after, metrics = trainer.step(state, jnp.zeros((1, 2)), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["gradient_norm"])
    assert after.step == 2
    assert all(map(np.array_equal, jax.tree.leaves(after._replace(step=kept.step)), jax.tree.leaves(kept)))


def test_patterns_that_match_no_layer(shapes_pipe):
    with pytest.raises(ValueError, match="matches none of the layers"):
        lora.init(Network.split(shapes_pipe.unet)[1], LoraConfig(pattern="nothing"), jax.random.key(0))


def test_changes_and_parameters_of_another_network(shapes_pipe):
    network, params = Network.split(shapes_pipe.unet)
    pair = {"A": jnp.ones((2, 3)), "B": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"the parameters have no layers up\.1, which LoRA changes"):
        lora.merged(params, {"up.1": pair})
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.init(params, LoraConfig(rank=0), jax.random.key(0))
    with pytest.raises(ValueError, match=r"not the parameters of this network, as Network\.split gives them"):
        network.bind(Network.split(shapes_pipe.prior_prior)[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr_scheduler": "step"}, "lr_scheduler='step' is not supported, only constant, linear, cosine"),
        ({"max_train_steps": 0, "lr_warmup_steps": -1}, "max_train_steps must be .*; lr_warmup_steps must not"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**settings)


def test_rates_by_step():
    rate = OptimizerConfig(learning_rate=1.0, lr_scheduler="linear", lr_warmup_steps=10, max_train_steps=110).rate()
    assert [round(float(rate(i)), 3) for i in (0, 5, 10, 60, 110)] == [0.0, 0.5, 1.0, 0.5, 0.0]
