"""Training of MoVQ and CLIP, of inpainting and hinted decoders, and with precomputed encodings."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import kandinsky_jax
from kandinsky_jax.checkpoint import flat_params, hub, load_network, tensor_names
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.training import latent_cache as encoded
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import DataError, Reader, listing
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.losses import clip_loss, movq_loss
from kandinsky_jax.training.step import OptimizerConfig
from kandinsky_jax.training.tasks.decoder import random_repaint_masks
from tests import shapes
from tests.conftest import SHAPES_MODEL, nchw, note, slow_and_campaign, worst
from tests.training.test_training_loop import StopAfter

COUNT = 10
TOWERS = {"text_encoder": "CLIPTextModelWithProjection", "image_encoder": "CLIPVisionModelWithProjection"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Captioned pictures, each with its depth map."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for i, caption in enumerate(shapes.captions(COUNT, seed=5)):
            Image.fromarray((shapes.draw(caption, rng) * 255).round().astype(np.uint8)).save(folder / f"{i}.png")
            depth = shapes.depth(caption.truth.shape, (32, 32), 16)
            Image.fromarray((depth * 255).astype(np.uint8)).save(folder / f"{i}-depth.png")
            row = {"file_name": f"{i}.png", "text": caption.text, "hint_file_name": f"{i}-depth.png"}
            file.write(json.dumps(row) + "\n")
    return folder


def config_of(data: Path, output: Path, **changed) -> Config:
    optimizer = OptimizerConfig(**({"learning_rate": 1e-3, "max_train_steps": 4} | changed.pop("optimizer", {})))
    given = {"model": str(SHAPES_MODEL), "resolution": 64, "train_batch_size": 4, "checkpointing_steps": 2} | changed
    return Config(data=str(data), output=str(output), optimizer=optimizer, **given)


# Losses beside PyTorch's ------------------------------------------------------------------------------------------


def gradients_agree(ours, theirs: torch.nn.Module) -> None:
    """Every gradient, max |d| / std at most 1e-3, by PyTorch's names."""
    flat = {".".join(map(str, path)): leaf for path, leaf in _paths(ours)}
    for name, parameter in theirs.named_parameters():
        [own] = [path for path in flat if tensor_names.torch_name(path) == name]
        wanted = np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
        found = tensor_names.to_torch(own, np.asarray(flat[own]))
        if wanted.std() < 1e-7:  # biases before a norm, keys' biases: zero but for rounding
            assert np.abs(found - wanted).max() < 1e-6, name
        else:
            assert note(np.abs(found - wanted).max() / max(wanted.std(), 1e-6), "gradient max|d| / std") < 1e-3, name


def _paths(tree, before=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*before, key))
        else:
            yield (*before, key), value


@pytest.mark.slow
def test_the_loss_of_movq():
    """Half of the pictures through the codebook, against diffusers' VQModel."""
    folder = SHAPES_MODEL / hub.DECODER / "movq"
    ours = load_network(NETWORKS["VQModel"], folder, jnp.float32)
    # In float64: the first layers' gradients are sums that nearly cancel, and PyTorch's own rounding in float32 is
    # 2e-3 of their spread.
    theirs = diffusers.VQModel.from_pretrained(folder, torch_dtype=torch.float32).double()
    rng = np.random.default_rng(0)
    pixels = np.stack([shapes.draw(c, rng) for c in shapes.captions(4)]).astype(np.float32) * 2 - 1
    # Not what it reconstructs perfectly: the slope of |x| is of either sign near 0, by rounding.
    pixels = pixels + 0.5 * rng.standard_normal(pixels.shape).astype(np.float32)
    quantized = np.array([True, False, True, False])
    network, params = Network.split(ours)
    value, gradients = jax.value_and_grad(lambda p: movq_loss(network, p, jnp.asarray(pixels), quantized))(params)

    x = torch.from_numpy(nchw(pixels)).double()
    z = theirs.encode(x).latents
    codebook = theirs.quantize.embedding.weight
    rows = z.permute(0, 2, 3, 1)
    codes = codebook[torch.cdist(rows.reshape(-1, 4), codebook).argmin(1)].view_as(rows).permute(0, 3, 1, 2)
    given = torch.where(torch.from_numpy(quantized)[:, None, None, None], z + (codes - z).detach(), z)
    error = theirs.decode(given, force_not_quantize=True).sample - x
    loss = error.abs().mean() + error.square().mean()
    loss = loss + (codes - z.detach()).square().mean() + 0.25 * (z - codes.detach()).square().mean()
    loss.backward()
    assert note(abs(float(value) / loss.item() - 1), "loss, relative") < 1e-5
    gradients_agree(gradients, theirs)


@pytest.mark.slow
def test_the_loss_of_clip():
    """Against transformers' towers, and its own contrastive loss."""
    prior = SHAPES_MODEL / hub.PRIOR
    ours = {name: load_network(NETWORKS[cls], prior / name, jnp.float32) for name, cls in TOWERS.items()}
    theirs = {
        name: getattr(transformers, cls).from_pretrained(prior / name, dtype=torch.float32)
        for name, cls in TOWERS.items()
    }
    rng = np.random.default_rng(0)
    ids = np.full((4, 20), 573, np.int32)
    ids[:, 0] = 572
    for row, length in zip(ids, (3, 7, 12, 18), strict=True):
        row[1:length] = rng.integers(0, 572, length - 1)
    pixels = rng.standard_normal((4, 64, 64, 3)).astype(np.float32)
    networks = {name: Network.split(module)[0] for name, module in ours.items()}
    params = {name: Network.split(module)[1] for name, module in ours.items()} | {"logit_scale": jnp.float32(2.5)}
    value, gradients = jax.value_and_grad(lambda p: clip_loss(networks, p, ids, pixels))(params)

    text = theirs["text_encoder"](torch.from_numpy(ids).long()).text_embeds
    image = theirs["image_encoder"](torch.from_numpy(nchw(pixels))).image_embeds
    scale = torch.tensor(2.5, requires_grad=True)
    logits = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(image).T * scale.exp()
    target = torch.arange(4)
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    assert note(abs(float(value) / loss.item() - 1), "loss, relative") < 1e-5
    assert abs(float(gradients["logit_scale"]) / scale.grad.item() - 1) < 1e-4
    for name, tower in theirs.items():
        gradients_agree(gradients[name], tower)


@pytest.mark.slow
def test_a_sharper_scale_than_100_is_100():
    prior = SHAPES_MODEL / hub.PRIOR
    ours = {name: load_network(NETWORKS[cls], prior / name, jnp.float32) for name, cls in TOWERS.items()}
    networks = {name: Network.split(module)[0] for name, module in ours.items()}
    params = {name: Network.split(module)[1] for name, module in ours.items()}
    ids = np.array([[572, 3, 573], [572, 4, 573]], np.int32)
    pixels = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    at = [float(clip_loss(networks, params | {"logit_scale": jnp.log(x)}, ids, pixels)) for x in (50.0, 100.0, 500.0)]
    assert at[1] == pytest.approx(at[2], rel=1e-5)
    assert at[0] != pytest.approx(at[1], rel=1e-3)


@pytest.mark.slow
def test_rows_of_padding_may_be_left_out_of_the_prior(shapes_pipe):
    """Of 77 text rows the last 53 are padding: without them, the same prediction."""
    rng = np.random.default_rng(0)
    hidden, pooled, noisy = (rng.standard_normal(s).astype(np.float32) for s in ((3, 77, 64), (3, 64), (3, 64)))
    mask = np.arange(77) < np.array([[5], [12], [24]])
    network, params = Network.split(shapes_pipe.prior_prior)
    outputs = [
        call(network, params, noisy, np.array([10, 500, 999]), call(network, params, pooled, *text, method="condition"))
        for text in ((hidden, mask), (hidden[:, :24], mask[:, :24]))
    ]
    assert worst(outputs[1], outputs[0]) < 1e-5


# Data -------------------------------------------------------------------------------------------------------------


def test_hints_in_every_form_of_data(folder, tmp_path):
    items = listing(folder)
    rows = [{"image": item.read(), "text": item.text, "hint": {"bytes": item.hint()}} for item in items]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for i, item in enumerate(items):
            files = {"png": item.read(), "txt": item.text.encode(), "hint.png": item.hint()}
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for place in (tmp_path / "rows.parquet", tmp_path / "rows.tar"):
        assert [(x.text, x.read(), x.hint()) for x in listing(place)] == [(x.text, x.read(), x.hint()) for x in items]
    line = {"file_name": "0.png", "text": "a", "hint_file_name": "absent.png"}
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / "0.png").write_bytes(items[0].read())
    (folder / "bad" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"absent\.png: there is no such file"):
        listing(folder / "bad")
    line = {"file_name": None, "text": "a", "hint_file_name": "0.png"}
    (folder / "bad" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="line 1: needed are file_name and text"):
        listing(folder / "bad")


def test_an_unreadable_hint_is_reported_like_a_picture(folder):
    [item, *_] = listing(folder)
    nan = io.BytesIO()
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(nan, "TIFF")
    reader = Reader(64, hints=True)
    for data in (b"no picture", nan.getvalue()):
        assert reader(item._replace(hint=lambda data=data: data), np.random.default_rng(0)) is None
        assert "the hint of 0.png" in reader.unreadable.pop("0.png")


def test_hints_are_cut_and_turned_with_their_pictures(tmp_path):
    """A picture that is its own hint stays so."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1)))
    data = io.BytesIO()
    ramp.save(data, "PNG")
    [item] = [listing(_folder_of(tmp_path, data.getvalue()))[0]]
    reader = Reader(64, hints=True, random_flip=True, random_crop=True)
    seen = set()
    for seed in range(8):
        arrays = reader(item, np.random.default_rng(seed))
        assert arrays["hint"].shape == (64, 64, 3)
        assert np.abs(arrays["hint"] * 255 - arrays["pixels"]).max() <= 1
        seen.add(arrays["pixels"].tobytes())
    assert len(seen) > 4


def _folder_of(folder: Path, data: bytes) -> Path:
    for name in ("a.png", "a-depth.png"):
        (folder / name).write_bytes(data)
    row = {"file_name": "a.png", "text": "a ramp", "hint_file_name": "a-depth.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return folder


def test_random_repaint_masks():
    """Rectangles of every size; one in eight is all of the picture."""
    masks = np.asarray(random_repaint_masks(jax.random.key(0), 4000, 8, 8))[..., 0]
    share = masks.mean((1, 2))
    assert set(np.unique(masks)) == {0, 1}
    assert 1 / 64 <= share.min() < 0.05
    assert 0.12 < (share == 1).mean() < 0.16
    for mask in masks[:50]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()


# Runs -------------------------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_encoded_once_is_encoded_at_every_step(folder, tmp_path, monkeypatch):
    """With `precompute` a run has the losses that it has without, reads no picture, and notices other settings."""
    monkeypatch.setattr(encoded, "CACHED_AT_ONCE", 4)  # the data is several, and the last one is not full
    for name, precompute in (("each", False), ("once", True)):
        options = {"precompute": precompute, "condition_dropout": 0.3, "text_length": 24}
        Run(Kind.PRIOR, config_of(folder, tmp_path / name, **options), quiet=True).train()
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "each"), rel=1e-5)
    about = tmp_path / "once" / "encoded" / "00000" / "about.json"
    before = about.stat().st_mtime_ns
    same, other = (config_of(folder, tmp_path / "once", precompute=True, text_length=length) for length in (24, 25))
    Run(Kind.PRIOR, same, quiet=True, accept_changes=True)
    assert about.stat().st_mtime_ns == before
    with pytest.warns(
        UserWarning, match="1 of 1 parts are not used, their pictures are encoded again: 00000: it was made of"
    ):
        Run(Kind.PRIOR, other, quiet=True, accept_changes=True)
    assert about.stat().st_mtime_ns != before


@pytest.mark.slow
def test_what_cannot_be_encoded_is_named_and_left_out(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = (folder / "metadata.jsonl").read_text().splitlines()[:5]
    for path in folder.glob("*.png"):
        (data / path.name).write_bytes(b"no picture" if path.name == "2.png" else path.read_bytes())
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    run = Run(Kind.DECODER, config_of(data, tmp_path / "out", precompute=True), quiet=True)
    assert [item.name for item in run.items] == ["0.png", "1.png", "3.png", "4.png"]
    assert "before the first step: 2.png" in (tmp_path / "out" / "bad_data.txt").read_text()
    assert next(run.batches)["latents"].shape == (4, 8, 8, 4)


def test_precompute_where_nothing_stays(folder, tmp_path):
    with pytest.raises(ValueError, match="of no use for movq"):
        Run(Kind.MOVQ, config_of(folder, tmp_path, precompute=True))
    with pytest.raises(ValueError, match="random_flip"):
        config_of(folder, tmp_path, precompute=True, random_flip=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, shapes_pipe) -> Path:
    """The small model's family with random weights in MoVQ and CLIP."""
    folder = tmp_path_factory.mktemp("scratch")
    prior, decoder = shapes_pipe.prior_pipe.components, shapes_pipe.decoder_pipe.components
    for parts in (prior, decoder):
        for i, name in enumerate(("movq", "text_encoder", "image_encoder")):
            if name in parts:
                parts[name] = type(parts[name])(parts[name].config, rngs=nnx.Rngs(i))
    kandinsky_jax.KandinskyV22PriorPipeline(**prior).save_pretrained(folder / hub.PRIOR)
    kandinsky_jax.KandinskyV22Pipeline(**decoder).save_pretrained(folder / hub.DECODER)
    return folder


@pytest.mark.parametrize("kind", slow_and_campaign([Kind.MOVQ, Kind.CLIP], Kind.CLIP))
def test_foundations_learn(folder, scratch, tmp_path, kind):
    """From random weights the loss falls by a third, and diffusers loads the result."""
    optimizer = {"max_train_steps": 40, "learning_rate": 1e-3, "lr_warmup_steps": 10}
    options = {"quantized_share": 0.25}
    options |= {"checkpointing_steps": 100, "validation_steps": 40, "text_length": 24}
    options["train_batch_size"] = 4 if kind == Kind.MOVQ else 8
    config = config_of(folder, tmp_path, model=str(scratch), optimizer=optimizer, **options)
    result = Run(kind, config, quiet=True).train()
    found = losses(tmp_path)
    assert note(np.mean(found[-5:]) / np.mean(found[:5]), "last losses / first") < 2 / 3
    if kind == Kind.MOVQ:
        theirs = diffusers.KandinskyV22Pipeline.from_pretrained(result)
        with Image.open(tmp_path / "samples" / "00000040.png") as sheet:  # pictures over what is made of them
            assert sheet.size == (8 * 64, 128)
            given, decoded = np.split(np.asarray(sheet, float), 2)
        shown = theirs.movq(torch.from_numpy(nchw((given[None, :, :64] / 127.5 - 1).astype(np.float32)))).sample
        assert shown.shape == (1, 3, 64, 64)
        assert np.abs(given - decoded).mean() < 80
    else:
        theirs = diffusers.KandinskyV22PriorPipeline.from_pretrained(result)
        pixels = [Reader(64, kandinsky_jax.images.CLIPImageProcessor(64, 64))(x, None) for x in listing(folder)]
        batch = torch.from_numpy(nchw(np.stack([arrays["clip_pixels"] for arrays in pixels])))
        embeds = theirs.image_encoder(batch).image_embeds.numpy(force=True)
        # The prior's statistics are those of the pictures that CLIP was trained on.
        assert worst(embeds.mean(0), theirs.prior.clip_mean[0].numpy(force=True)) < 1e-3
        assert worst(embeds.std(0), theirs.prior.clip_std[0].numpy(force=True)) < 1e-3


EVERY = (Kind.MOVQ, Kind.CLIP, Kind.PRIOR, Kind.DECODER, Kind.LORA_DECODER)


@pytest.mark.campaign  # CI stops and resumes in test_training_loop.py
@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_goes_on_where_it_stopped(folder, tmp_path, kind):
    """Stopped between two steps and begun again: the weights and losses of a run that went through, bit for bit."""

    def run(output: str) -> Run:
        options = {"optimizer": {"max_train_steps": 6, "ema_decay": 0.9}, "text_length": 24}
        options |= {"precompute": kind in (Kind.PRIOR, Kind.DECODER), "condition_dropout": 0.2}
        return Run(kind, config_of(folder, tmp_path / output, **options), quiet=True)

    run("whole").train()
    assert run("parts").train(stop=StopAfter()) is None
    run("parts").train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    files = sorted(
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "model").rglob("*.safetensors")
    )
    assert files
    for file in files:
        one, two = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one), file


@pytest.mark.parametrize("member", slow_and_campaign((hub.INPAINT, hub.CONTROLNET), hub.CONTROLNET))
def test_decoders_of_other_modes(folder, tmp_path, member):
    """Their own data, pictures on the way, and a result that diffusers loads."""
    options = {"validation_steps": 4, "validation_prompts": ("a red circle", "a star"), "precompute": True}
    run = Run(Kind.DECODER, config_of(folder, tmp_path, model=str(SHAPES_MODEL / member), **options), quiet=True)
    before = flat_params(*run.task.modules.values())
    result = run.train()
    with Image.open(tmp_path / "samples" / "00000004.png") as sheet:
        assert sheet.size == (128, 64)
    assert all(np.isfinite(losses(tmp_path)))
    cls = "KandinskyV22InpaintPipeline" if member == hub.INPAINT else "KandinskyV22ControlnetPipeline"
    theirs = getattr(diffusers, cls).from_pretrained(result).unet.state_dict()["conv_in.weight"].numpy()
    assert not np.array_equal(theirs, tensor_names.to_torch("conv_in.kernel", np.asarray(before["conv_in.kernel"])))
    channels = np.abs(theirs).sum((0, 2, 3))
    assert (channels > 0).all()


def test_a_hinted_decoder_needs_hints(folder, tmp_path):
    [first, *_] = listing(folder)
    (tmp_path / "a.png").write_bytes(first.read())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a circle"}))
    with pytest.raises(DataError, match=r"a\.png: it has no hint, which this UNet takes"):
        Run(Kind.DECODER, config_of(tmp_path, tmp_path / "out", model=str(SHAPES_MODEL / hub.CONTROLNET)))
