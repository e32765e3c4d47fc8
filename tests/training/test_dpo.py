"""Diffusion-DPO: pairs as data, the loss beside its formula and torch's networks, and runs of both kinds."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.diffusion import Network
from kandinsky_jax.training.data import DataError, Reader, listing
from kandinsky_jax.training.dpo import DPOConfig, dpo_loss
from kandinsky_jax.training.kinds import DPO, Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.tasks import make_task
from tests import shapes
from tests.conftest import note, slow_and_campaign
from tests.training.test_training_loop import config_of

PAIRS = 6
WEIGHT = "up_blocks.0.attentions.0.to_out.0.weight"


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def pairs() -> list[tuple[str, bytes, bytes]]:
    """Captions without a colour; a blue shape is preferred to a red one."""
    rng, found = np.random.default_rng(0), []
    for i in range(PAIRS):
        shape = shapes.SHAPES[i % len(shapes.SHAPES)]
        two = [shapes.caption(shapes.Verdict(colour, "white", shape)) for colour in ("blue", "red")]
        found.append((f"a {shape} on a white background", *(png(shapes.draw(each, rng)) for each in two)))
    return found


def write_pairs(folder: Path) -> Path:
    lines = []
    for i, (text, *pictures) in enumerate(pairs()):
        names = [f"{i}-{which}.png" for which in ("preferred", "rejected")]
        for name, data in zip(names, pictures, strict=True):
            (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": names[0], "rejected_file_name": names[1], "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


# Data -------------------------------------------------------------------------------------------------------------


def test_pairs_of_metadata_and_of_parquet_are_the_same(data, tmp_path):
    wanted = pairs()
    rows = [
        {"image": {"bytes": good, "path": None}, "rejected_image": {"bytes": bad, "path": None}, "text": text}
        for text, good, bad in wanted
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for folder in (data, tmp_path):
        found = listing(folder)
        assert not found.skipped.count
        assert [(item.text, item.read(), item.rejected()) for item in found] == wanted
    assert listing(data)[0].size == len(wanted[0][1]) + len(wanted[0][2])


def test_both_pictures_are_read_and_flipped_alike(data):
    items = listing(data)
    reader, plain = Reader(64, random_flip=True, pairs=True), Reader(64, pairs=True)
    rng, flips = np.random.default_rng(0), []
    for item in items:
        found, straight = reader(item, rng), plain(item, rng)
        for name in ("pixels", "rejected_pixels"):
            assert found[name].shape == (64, 64, 3)
            assert not np.array_equal(straight["pixels"], straight["rejected_pixels"])
            flipped = not np.array_equal(found[name], straight[name])
            flips.append(flipped)
            assert np.array_equal(found[name], straight[name][:, ::-1] if flipped else straight[name])
    assert flips[::2] == flips[1::2]
    assert set(flips) == {True, False}
    assert "rejected_pixels" not in Reader(64)(items[0], rng)


def test_pictures_without_a_pair_are_reported(data, folder, tmp_path, pipe):
    with pytest.raises(DataError, match="it has no rejected_file_name"):
        Run(Kind.DPO_DECODER, config_of(folder, tmp_path / "none"), pipe, quiet=True)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text(lines[0].replace("0-rejected", "missing"))
    (tmp_path / "0-preferred.png").write_bytes((data / "0-preferred.png").read_bytes())
    with pytest.raises(DataError, match=r"missing.png: there is no such file"):
        listing(tmp_path)


# The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    errors = rng.random((4, 16)) * 1e-2
    given = torch.from_numpy(errors)
    inside = -0.5 * 2500 * ((given[0] - given[1]) - (given[2] - given[3]))
    expected = -torch.nn.functional.logsigmoid(inside).mean().item()
    assert abs(dpo_loss(*jnp.float32(errors), 2500.0) - expected) < 1e-5
    assert dpo_loss(*jnp.float32(errors[[0, 1, 0, 1]]), 2500.0) == pytest.approx(math.log(2))


def test_the_gradient_of_the_loss_is_a_difference():
    with jax.enable_x64(True):
        errors, direction = np.random.default_rng(0).random((2, 4, 16))
        loss = lambda x: dpo_loss(*(jnp.asarray(row) for row in x), 3.0)  # noqa: E731
        step = 1e-6
        slope = (loss(errors + step * direction) - loss(errors - step * direction)) / (2 * step)
        along = (jax.grad(loss)(jnp.asarray(errors)) * direction).sum()
        assert abs(along - slope) <= 1e-7 * abs(slope)
        far = jax.grad(loss)(jnp.asarray(errors) * 1e6)
        assert np.isfinite(far).all()


def changed(params, weight):
    flat = lora.flat(params)
    return lora.unflat(flat | {WEIGHT: flat[WEIGHT] + weight})


@pytest.mark.slow
def test_the_loss_and_its_gradient_are_torchs(pipe, reference, tmp_path):
    """The loop of the authors' script, with diffusers' UNet: a changed one, and the reference as it is."""
    config = config_of(tmp_path, tmp_path, dpo=DPOConfig(lora=False, beta=250.0))
    task = make_task(Kind.DPO_DECODER, config, pipe)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = {"image_embeds": normal(3, 64), "latents": normal(3, 8, 8, 4), "rejected_latents": normal(3, 8, 8, 4)}
    batch |= {"noise": normal(3, 8, 8, 4), "timesteps": np.array([10, 500, 900])}
    params = Network.split(pipe.unet)[1]
    change = 3 * normal(*lora.flat(params)[WEIGHT].shape)
    loss = task.loss()
    value, gradient = jax.jit(jax.value_and_grad(lambda w: loss(changed(params, w), batch, task.frozen())))(change)

    theirs = copy.deepcopy(reference[1].unet)
    [weight] = [p for name, p in theirs.named_parameters() if name == WEIGHT]
    weight.data += torch.from_numpy(change)
    scheduler = diffusers.DDPMScheduler.from_config(reference[1].scheduler.config)
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
    latents = torch.cat([tensors["latents"], tensors["rejected_latents"]]).permute(0, 3, 1, 2)
    noise, timesteps = tensors["noise"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1), tensors["timesteps"].repeat(2)
    noisy = scheduler.add_noise(latents, noise, timesteps)

    def errors(unet):
        embeds = tensors["image_embeds"].repeat(2, 1)
        output = unet(noisy, timesteps, None, added_cond_kwargs={"image_embeds": embeds}).sample[:, :4]
        return (output - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)

    model = errors(theirs)
    with torch.no_grad():
        ref = errors(reference[1].unet)
    expected = -torch.nn.functional.logsigmoid(-0.5 * 250 * ((model[0] - model[1]) - (ref[0] - ref[1]))).mean()
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 0.01
    assert note(abs(value - expected.item()), "difference of losses") < 1e-4
    wanted = weight.grad.numpy()
    assert note(np.abs(gradient - wanted).max() / np.abs(wanted).max(), "of the largest gradient") < 1e-3


def test_settings_that_are_of_no_use(pipe, data, tmp_path):
    with pytest.raises(ValueError, match="snr_gamma is of no use for dpo-decoder"):
        Run(Kind.DPO_DECODER, config_of(data, tmp_path, snr_gamma=5.0), pipe, quiet=True)
    with pytest.raises(ValueError, match="beta must be a number above 0, got 0"):
        DPOConfig(beta=0)


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "with_lora"),
    slow_and_campaign([(Kind.DPO_DECODER, True), (Kind.DPO_PRIOR, False)], (Kind.DPO_DECODER, True)),
)
def test_a_run(pipe, data, tmp_path, kind, with_lora):
    """The first loss is log(2), since the network is the reference; later ones are less for pairs that are alike."""
    optimizer = {"learning_rate": 3e-3 if with_lora else 1e-3, "max_train_steps": 6}
    options = {"precompute": kind == Kind.DPO_PRIOR, "validation_steps": 6, "validation_prompts": ("a circle",)}
    config = config_of(data, tmp_path, optimizer=optimizer, dpo=DPOConfig(lora=with_lora), **options)
    run = Run(kind, config, pipe, quiet=True)
    [module] = run.task.modules.values()
    before = {name: np.asarray(leaf) for name, leaf in flat_params(module).items()}
    result = run.train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert note(np.mean(losses[-2:]), "last losses") < 0.6
    assert (tmp_path / "samples" / "00000006.png").exists()
    assert all(np.array_equal(flat_params(module)[name], leaf) for name, leaf in before.items())
    if with_lora:
        assert all(name.startswith("unet.") for name in load_file(result / lora.FILE))
    else:
        diffusers.KandinskyV22PriorPipeline.from_pretrained(result)


def test_every_kind_has_a_task(pipe, data, tmp_path):
    for kind in DPO:
        for with_lora in (True, False):
            task = make_task(kind, config_of(data, tmp_path, dpo=DPOConfig(lora=with_lora)), pipe)
            assert task.kind == kind
            full = task.full if with_lora else task
            batch = {"noise": jnp.ones((2, 3)), full.clean_name: jnp.zeros((2, 3))}
            both = full.both_pictures(batch | {f"rejected_{full.clean_name}": jnp.ones((2, 3))})
            assert both.keys() == batch.keys()
            assert both[full.clean_name].sum(1).tolist() == [0, 0, 3, 3]
            assert both["noise"].shape == (4, 3)
            assert task.frozen() is not None
