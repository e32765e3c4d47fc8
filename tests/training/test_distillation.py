"""Distillation compared with PyTorch twins of the papers' steps, and runs from data to a fast student."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Sequence

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from PIL import Image

from kandinsky_jax import KandinskyV22CombinedPipeline, lora
from kandinsky_jax.checkpoint import flat_params, set_params
from kandinsky_jax.checkpoint.recommended_settings import RecommendedSettings
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.training import latent_cache
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, without_padding
from kandinsky_jax.training.distillation import DistillationConfig, draw_steps, solver_timesteps
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.run_record import record_changes, run_record, weights_digest
from kandinsky_jax.training.step import OptimizerConfig, Trainer
from kandinsky_jax.training.tasks import (
    DecoderTask,
    DiffusionTask,
    DistillationTask,
    DistillDecoderTask,
    DistillPriorTask,
    LoraTask,
    needs_captions,
)
from kandinsky_jax.training.tasks.generated_embeds import caption_keys
from tests.conftest import SHAPES_MODEL, note
from tests.pipelines.test_compile import compilations
from tests.training.test_losses_and_steps import TARGETS, by_peft_name, lora_of, torch_arrays

BATCH = 4
# LCM with the settings of the reference's script; the other ones differ from it in everything that the loss reads.
LCM = DistillationConfig(
    lora=False, method="lcm", guidance_scale=2.0, guidance_scale_max=8.0, original_inference_steps=50
)
TCD = DistillationConfig(
    lora=False, method="tcd", guidance_scale=3.0, original_inference_steps=25, distance="l2", huber_c=0.1
)


def task_of(pipe, kind: str, config: DistillationConfig, **changed) -> DistillationTask:
    cls = DistillDecoderTask if kind == "decoder" else DistillPriorTask
    return cls(pipe, Config(model=str(SHAPES_MODEL), data="", output="", distillation=config, **changed))


def batch_of(task: DiffusionTask, seed: int = 0) -> dict[str, np.ndarray]:
    """An encoded batch with what is drawn for it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = {"image_embeds": normal(BATCH, 64)}
    if isinstance(task, DecoderTask):
        batch |= {"latents": normal(BATCH, 8, 8, 4)}
    else:
        mask = np.arange(77) < rng.integers(5, 20, (BATCH, 1))
        batch |= {"prompt_embeds": normal(BATCH, 64), "text_encoder_hidden_states": normal(BATCH, 77, 64)}
        batch |= {"text_mask": mask}
    return jax.tree.map(np.asarray, task.draw()(batch, jax.random.key(seed)))


class Twin:
    """The step of both papers in PyTorch, written from their equations: on copies of the reference's network."""

    def __init__(self, reference, task: DistillationTask, rank: int | None = None):
        prior_pipe, decoder_pipe = reference
        self.decoder, self.config = isinstance(task, DistillDecoderTask), task.config.distillation
        self.teacher = decoder_pipe.unet if self.decoder else prior_pipe.prior
        self.network = copy.deepcopy(self.teacher).train()
        self.target = self.network
        self.prior_pipe = prior_pipe
        if self.decoder:
            scheduler = diffusers.DDPMScheduler.from_config(decoder_pipe.scheduler.config)
        else:
            scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        self.alphas_cumprod = scheduler.alphas_cumprod
        if rank is not None:
            self.network.requires_grad_(False)
            targets = TARGETS["decoder" if self.decoder else "prior"] + (["conv1"] if self.decoder else [])
            torch.manual_seed(0)
            self.network.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
            for name, parameter in self.network.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.02 * torch.randn_like(parameter)

    def level(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (like.ndim - 1))
        return alpha**0.5, (1 - alpha) ** 0.5

    def predict(self, network, noisy, timesteps, condition) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean sample and the noise."""
        signal, sigma = self.level(timesteps, noisy)
        if self.decoder:
            kwargs = {"image_embeds": condition["image_embeds"]}
            noise = network(noisy, timesteps, None, added_cond_kwargs=kwargs).sample[:, :4]
            return (noisy - sigma * noise) / signal, noise
        clean = network(
            noisy,
            timestep=timesteps,
            proj_embedding=condition["prompt_embeds"],
            encoder_hidden_states=condition["text_encoder_hidden_states"],
            attention_mask=condition["text_mask"],
        ).predicted_image_embedding
        return clean, (noisy - signal * clean) / sigma

    def unconditional(self, condition: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.decoder:
            return {"image_embeds": self.prior_pipe.get_zero_embed(BATCH, "cpu")}
        pipe = self.prior_pipe
        tokens = pipe.tokenizer([""], padding="max_length", max_length=77, return_tensors="pt")
        output = pipe.text_encoder(tokens.input_ids)
        arrays = (output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool())
        return {name: x.repeat(BATCH, *[1] * (x.ndim - 1)) for name, x in zip(condition, arrays, strict=True)}

    def consistent(self, network, noisy, timesteps, ends, condition) -> torch.Tensor:
        clean, noise = self.predict(network, noisy, timesteps, condition)
        if self.config.method == "tcd":
            signal, sigma = self.level(ends, noisy)
            return signal * clean + sigma * noise
        scaled = (timesteps * self.config.timestep_scaling).reshape(-1, *[1] * (noisy.ndim - 1))
        return 0.25 / (scaled**2 + 0.25) * noisy + scaled / (scaled**2 + 0.25) ** 0.5 * clean

    def loss(self, batch) -> torch.Tensor:
        given = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
        names = ["image_embeds"] if self.decoder else ["prompt_embeds", "text_encoder_hidden_states", "text_mask"]
        condition = {name: given[name] for name in names}
        clean, noise, start = given["latents" if self.decoder else "image_embeds"], given["noise"], given["timesteps"]
        if self.decoder:
            clean, noise = (x.permute(0, 3, 1, 2) for x in (clean, noise))
        else:
            clean = (clean - self.teacher.clip_mean.detach()) / self.teacher.clip_std.detach()
        reached = (start - 1000 // self.config.original_inference_steps).clamp(min=0)
        signal, sigma = self.level(start, clean)
        noisy = signal * clean + sigma * noise
        with torch.no_grad():
            cond = self.predict(self.teacher, noisy, start, condition)
            uncond = self.predict(self.teacher, noisy, start, self.unconditional(condition))
            scale = given["guidance_scale"].reshape(-1, *[1] * (clean.ndim - 1))
            guided = [b + scale * (a - b) for a, b in zip(cond, uncond, strict=True)]
            signal, sigma = self.level(reached, clean)
            closer = signal * guided[0] + sigma * guided[1]
            wanted = self.consistent(self.target, closer, reached, given["ends"], condition)
        found = self.consistent(self.network, noisy, start, given["ends"], condition)
        if self.config.distance == "l2":
            return torch.nn.functional.mse_loss(found, wanted)
        c = self.config.huber_c
        return (((found - wanted) ** 2 + c**2) ** 0.5 - c).mean()


def check_gradients(ours: dict[str, np.ndarray], twin: Twin) -> None:
    """|d| / |gradients|, all layers together: predictions cancel in the loss, and so do single layers' gradients."""
    theirs = {n: p.grad.numpy() for n, p in twin.network.named_parameters() if p.requires_grad and p.grad is not None}
    apart = sum(np.square(ours[name].reshape(wanted.shape) - wanted).sum() for name, wanted in theirs.items())
    whole = sum(np.square(wanted).sum() for wanted in theirs.values())
    assert whole > 0
    assert note((apart / whole) ** 0.5, "gradients, |d| / |g|") <= 2e-4


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("decoder", LCM),
        ("prior", TCD),
        pytest.param("prior", LCM, marks=pytest.mark.slow),
        pytest.param("decoder", TCD, marks=pytest.mark.slow),
    ],
    ids=["decoder-lcm", "prior-tcd", "prior-lcm", "decoder-tcd"],
)
def test_loss_and_gradients(shapes_pipe, reference, kind, config):
    task = task_of(shapes_pipe, kind, config)
    twin, batch = Twin(reference, task), batch_of(task)
    wanted = twin.loss(batch)
    wanted.backward()
    frozen = task.frozen()
    value, gradients = jax.jit(jax.value_and_grad(task.loss()))(frozen, batch, frozen)
    assert note(abs(float(value) / wanted.item() - 1), "distillation loss, relative") <= 1e-5
    check_gradients(torch_arrays(gradients), twin)


@pytest.mark.parametrize(
    ("kind", "config"),
    [pytest.param("decoder", LCM, marks=pytest.mark.slow), pytest.param("prior", TCD, marks=pytest.mark.campaign)],
)
def test_loss_and_gradients_of_lora_with_an_average(shapes_pipe, reference, kind, config):
    """LoRA of convolutions too, with targets by the average of the changes."""
    pattern = "(" + "|".join([*TARGETS[kind], *(["conv1"] if kind == "decoder" else [])]) + ")$"
    full = task_of(
        shapes_pipe,
        kind,
        dataclasses.replace(config, lora=True, ema_target=True),
        lora=LoraConfig(rank=4, alpha=8, pattern=pattern),
        optimizer=OptimizerConfig(ema_decay=0.9),
    )
    task = LoraTask(shapes_pipe, full.config, full)
    twin, batch = Twin(reference, full, rank=4), batch_of(full, 3)
    changes = {  # without the axes of a convolution's second half, which is 1 x 1
        name: {"A": pair["A"], "B": pair["B"].reshape(pair["B"].shape[:2])} for name, pair in lora_of(twin).items()
    }
    first = task.initial(jax.random.key(0))
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, changes)  # the same layers
    average = {name: pair | {"B": -3 * pair["B"]} for name, pair in changes.items()}  # far off: no cancelling
    twin.target = copy.deepcopy(twin.network)
    for name, parameter in twin.target.named_parameters():
        if ".lora_B." in name:
            parameter.data *= -3
    wanted = twin.loss(batch)
    wanted.backward()
    value, gradients = jax.jit(jax.value_and_grad(task.loss()))(changes, batch, task.frozen(), average)
    assert note(abs(float(value) / wanted.item() - 1), "distillation loss, relative") <= 1e-5
    check_gradients(by_peft_name(gradients), twin)


def test_drawn_steps_are_those_of_the_scheduler():
    """Every step of the solver comes up, a student's end is never later than where the solver gets to."""
    grid = solver_timesteps(1000, 50)
    theirs = diffusers.LCMScheduler(original_inference_steps=50)
    theirs.set_timesteps(50)
    assert grid[::-1].tolist() == theirs.timesteps.tolist()
    draws = draw_steps(jax.random.key(0), 4096, 1000, LCM)
    assert set(draws.timesteps.tolist()) == set(grid.tolist())
    assert not np.any(draws.ends)
    assert 2 <= np.min(draws.guidance_scale) < 2.1
    assert 7.9 < np.max(draws.guidance_scale) <= 8
    of_tcd = draw_steps(jax.random.key(0), 4096, 1000, TCD)
    reached = np.maximum(np.asarray(of_tcd.timesteps) - 40, 0)
    assert np.all(of_tcd.ends <= reached)
    assert set(of_tcd.ends.tolist()) == {0, *solver_timesteps(1000, 25)[:-1].tolist()}
    assert np.all(of_tcd.guidance_scale == 3)


def kept_bytes(task: DecoderTask) -> int:
    """Bytes that the forward pass of a rematerialised step keeps for the backward pass; nothing is computed."""
    trainer = Trainer(task.loss(), OptimizerConfig(remat=True))
    params = task.initial(jax.random.key(0))
    further = () if (frozen := task.frozen()) is None else (frozen,)

    def backward(params, batch, *further):
        return jax.vjp(lambda p: trainer._loss(p, batch, *further), params)[1]

    kept = jax.eval_shape(backward, params, batch_of(task), *further)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.slow
def test_remat_keeps_nothing_of_teacher_and_target(shapes_pipe):
    """What is kept is the student's, as in training without a teacher, and the target, which is as large as latents."""
    distilled = task_of(shapes_pipe, "decoder", LCM)
    plain = DecoderTask(shapes_pipe, distilled.config)
    assert kept_bytes(distilled) <= kept_bytes(plain) + 2 * batch_of(plain)["latents"].nbytes


# Embeddings that the prior generates ------------------------------------------------------------------------------

GENERATED = DistillationConfig(embeddings="prior")
CAPTIONS = ("a red circle", "a large blue star on a green ground", "a yellow square", "a red circle on white")


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    return data.getvalue()


def items_of(captions: Sequence[str]) -> list[Captioned]:
    return [Captioned(f"{i}.png", text, picture) for i, text in enumerate(captions)]


def read(task: DistillationTask, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """A batch of the reader, at the length of the text tower."""
    reader = task.reader()
    rows = [reader(item, np.random.default_rng(0)) for item in items_of(captions)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def embeds_of(task: DistillationTask, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(task.encode_embeds(batch))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in units of the spread."""
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize("scale", [None, 1.0], ids=["guided", "unguided"])
def test_generated_embeddings_are_those_of_the_prior(shapes_pipe, monkeypatch, scale):
    """With the model's recommended guidance, else 4; and no program is compiled for further batches of a shape."""
    monkeypatch.setattr(shapes_pipe.decoder_pipe, "_recommended", RecommendedSettings(prior_guidance_scale=scale))
    task = task_of(shapes_pipe, "decoder", GENERATED, resolution=64, seed=5)
    batch = read(task, CAPTIONS)
    assert batch.keys() == {"pixels", "input_ids", "text_mask"}
    keys = caption_keys(5, batch["input_ids"], batch["text_mask"])
    options = {"num_inference_steps": 25, "guidance_scale": 4.0 if scale is None else scale}
    wanted = shapes_pipe.prior_pipe([*CAPTIONS], generator=keys, output_type="np", **options).image_embeds
    encoded = task.encode(without_padding(batch))
    assert encoded.keys() == {"image_embeds", "latents"}
    assert note(apart(np.asarray(encoded["image_embeds"]), wanted), "generated embeddings, |d| / spread") <= 1e-4
    with compilations() as events:
        task.encode(without_padding(read(task, CAPTIONS[::-1])))
    assert not events


def test_noise_of_a_caption_does_not_depend_on_its_batch(shapes_pipe):
    """Nor on the padding of other captions; but on the seed."""
    task = task_of(shapes_pipe, "decoder", GENERATED, resolution=64)
    whole = embeds_of(task, read(task, CAPTIONS))
    other = embeds_of(task, without_padding(read(task, [CAPTIONS[2], CAPTIONS[0]])))
    assert note(apart(other, whole[[2, 0]]), "in other batches, |d| / spread") <= 1e-4
    seeded = dataclasses.replace(task, config=dataclasses.replace(task.config, seed=1))
    assert apart(embeds_of(seeded, read(task, CAPTIONS)), whole) > 0.1


def test_cache_and_record_notice_what_generates_embeddings(shapes_pipe, monkeypatch):
    """The setting, the seed, the guidance and the prior's weights; a seed is nothing to embeddings of pictures."""
    items = items_of(CAPTIONS)
    prior = nnx.clone(shapes_pipe.prior_prior)
    set_params(prior, flat_params(prior) | {"clip_mean": np.asarray(flat_params(prior)["clip_mean"]) + 1})
    other_prior = KandinskyV22CombinedPipeline.from_pipe(shapes_pipe, prior_prior=prior)

    def of(pipe=shapes_pipe, config=GENERATED, **changed) -> tuple[str, dict[str, object]]:
        task = task_of(pipe, "decoder", config, resolution=64, **changed)
        digests = {name: weights_digest(flat_params(module)) for name, module in task.networks.items()}
        mark = latent_cache._mark(task, task.reader(), items)
        return mark, run_record(task.kind, task.config, items, digests, task.further_settings)

    mark, record = of()
    assert of()[0] == mark
    assert {"weights of text_encoder", "weights of prior", "weights of movq", "weights of unet"} <= record.keys()
    assert "weights of image_encoder" not in record
    for changes, name in (
        ({"config": DistillationConfig()}, "distillation.embeddings"),
        ({"seed": 1}, "seed"),
        ({"pipe": other_prior}, "weights of prior"),
    ):
        other_mark, other_record = of(**changes)
        assert other_mark != mark, name
        assert [*record_changes(record, other_record)] == [name]
    assert of(config=DistillationConfig())[0] == of(config=DistillationConfig(), seed=1)[0]
    monkeypatch.setattr(shapes_pipe.decoder_pipe, "_recommended", RecommendedSettings(prior_guidance_scale=3.0))
    other_mark, other_record = of()
    assert other_mark != mark
    assert [*record_changes(record, other_record)] == ["guidance_scale of the embeddings"]


def test_where_generated_embeddings_make_no_sense(shapes_pipe):
    with pytest.raises(ValueError, match=r"distillation.embeddings='prior' is of no use for distill-prior"):
        task_of(shapes_pipe, "prior", GENERATED)
    with pytest.raises(ValueError, match=r"embeddings='text' is not supported, only pictures, prior"):
        DistillationConfig(embeddings="text")
    generated, plain = (task_of(shapes_pipe, "decoder", config).config for config in (GENERATED, LCM))
    assert needs_captions(Kind.DISTILL_DECODER, generated)
    assert not needs_captions(Kind.DISTILL_DECODER, plain)
    assert needs_captions(Kind.DISTILL_PRIOR, plain)


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_a_run_with_generated_embeddings(shapes_pipe, tmp_path, precompute):
    """From pictures with captions to a LoRA; one without a caption is left out."""
    data = tmp_path / "data"
    data.mkdir()
    for i, text in enumerate((*CAPTIONS, None)):
        (data / f"{i}.png").write_bytes(picture())
        if text is not None:
            (data / f"{i}.txt").write_text(text)
    config = Config(
        model=str(SHAPES_MODEL),
        data=str(data),
        output=str(tmp_path / "out"),
        resolution=64,
        train_batch_size=4,
        precompute=precompute,
        optimizer=OptimizerConfig(max_train_steps=2),
        distillation=GENERATED,
    )
    with pytest.warns(UserWarning, match=r"4 pictures are used, not used are 1 files or rows"):
        result = Run(Kind.DISTILL_DECODER, config, shapes_pipe, quiet=True).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    assert (result / lora.FILE).exists()
