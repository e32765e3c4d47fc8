"""LoRA files, ours and diffusers', in either library: the same picture from the same seed."""

from __future__ import annotations

import copy
import json

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from kandinsky_jax import CheckpointError, KandinskyV22CombinedPipeline, TorchGenerator, lora
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.sampling import Network
from tests.conftest import SHAPES_MODEL, note
from tests.test_compile import compilations

PROMPT = "a red circle on a blue background"
SIZE = {"height": 64, "width": 64, "output_type": "np"}
STEPS = {"num_inference_steps": 8, "prior_num_inference_steps": 5}


@pytest.fixture
def pipe() -> KandinskyV22CombinedPipeline:
    """A pipeline of one's own: its weights will change."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_lora(module, seed: int, rank: int = 4, size: float = 0.2) -> lora.Lora:
    """Changes that can be seen."""
    changes = lora.init(Network.split(module)[1], LoraConfig(rank), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return {n: p | {"B": (size * rng.standard_normal(p["B"].shape)).astype(np.float32)} for n, p in changes.items()}


def draw(pipe, **extra) -> np.ndarray:
    return pipe(PROMPT, generator=TorchGenerator(0), **SIZE, **STEPS, **extra).images


def their_picture(reference, unet=None, prior=None) -> np.ndarray:
    """The reference's, with other networks."""
    prior_pipe, decoder_pipe = reference
    prior_pipe = diffusers.KandinskyV22PriorPipeline(**prior_pipe.components | ({"prior": prior} if prior else {}))
    decoder_pipe = diffusers.KandinskyV22Pipeline(**decoder_pipe.components | ({"unet": unet} if unet else {}))
    for each in (prior_pipe, decoder_pipe):
        each.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    embeds = prior_pipe(PROMPT, num_inference_steps=5, generator=generator).to_tuple()
    return decoder_pipe(*embeds, num_inference_steps=8, generator=generator, **SIZE).images


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours - theirs) * 255
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4


@pytest.mark.parametrize("kind", [pytest.param("unet", marks=pytest.mark.slow), "prior"])
@pytest.mark.parametrize("alpha", [2.0, pytest.param(None, marks=pytest.mark.slow)])
def test_ours_in_diffusers(pipe, reference, tmp_path, kind, alpha):
    module = pipe.unet if kind == "unet" else pipe.prior_prior
    plain = draw(pipe)
    lora.write(tmp_path, random_lora(module, 1), LoraConfig(4, alpha), kind)
    pipe.load_lora_weights(tmp_path)
    ours = draw(pipe)
    assert np.abs(ours - plain).mean() * 255 > 1
    network = copy.deepcopy(reference[1].unet if kind == "unet" else reference[0].prior)
    network.load_lora_adapter(tmp_path, prefix=kind, weight_name=lora.FILE)
    same(ours, their_picture(reference, **{kind: network}))


@pytest.mark.parametrize("kind", [pytest.param("unet", marks=pytest.mark.slow), "prior"])
def test_diffusers_in_ours(pipe, reference, tmp_path, kind):
    network = copy.deepcopy(reference[1].unet if kind == "unet" else reference[0].prior)
    network.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0"]))
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    network.save_lora_adapter(tmp_path)
    pipe.load_lora_weights(tmp_path)
    same(draw(pipe), their_picture(reference, **{kind: network}))


def test_several_weights_and_back(pipe, tmp_path):
    """Two at once add up; a weight of zero, or unloading, is the picture as it was, bit for bit; nothing compiles."""
    before = {name: np.asarray(leaf) for name, leaf in flat_params(pipe.unet).items()}
    plain = draw(pipe)
    for i in (1, 2):
        lora.write(tmp_path / f"{i}", random_lora(pipe.unet, i), LoraConfig(4), "unet")
    lora.write(tmp_path / "prior", random_lora(pipe.prior_prior, 3), LoraConfig(4), "prior")
    pipe.load_lora_weights(tmp_path / "1", "one")
    one = draw(pipe)
    pipe.load_lora_weights(tmp_path / "2" / lora.FILE, "two", weight=0.5)
    with compilations() as events:
        both = draw(pipe)
    assert not events
    assert np.abs(both - one).mean() * 255 > 1
    pipe.load_lora_weights(tmp_path / "prior")
    assert pipe.get_active_adapters() == ["one", "two", "default_0"]
    pipe.set_adapters("one")
    assert np.array_equal(draw(pipe), one)
    pipe.set_adapters(["two", "one"], [0.5, 1.0])
    assert np.abs(draw(pipe) - both).max() * 255 < 0.05
    pipe.set_adapters([])
    assert np.array_equal(draw(pipe), plain)
    pipe.set_adapters(["one", "default_0"])
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), plain)
    after = flat_params(pipe.unet)
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())


def test_fused_changes_stay(pipe, tmp_path):
    lora.write(tmp_path, random_lora(pipe.unet, 1), LoraConfig(4), "unet")
    pipe.load_lora_weights(tmp_path)
    changed = draw(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    assert np.array_equal(draw(pipe), changed)
    pipe.load_lora_weights(tmp_path)
    assert np.abs(draw(pipe) - changed).mean() * 255 > 0.1


def test_pipelines_that_share_a_network_share_its_lora(pipe, tmp_path):
    lora.write(tmp_path, random_lora(pipe.unet, 1), LoraConfig(4), "unet")
    other = KandinskyV22CombinedPipeline.from_pipe(pipe)
    pipe.load_lora_weights(tmp_path)
    assert other.get_active_adapters() == ["default_0"]
    other.unload_lora_weights()
    assert pipe.get_active_adapters() == []


def test_names_of_the_time_before_peft(pipe, tmp_path):
    """As the reference's LoRA scripts for Kandinsky write them."""
    changes = random_lora(pipe.unet, 1)
    lora.write(tmp_path / "new", changes, LoraConfig(4), "unet")
    old = {}
    for name, pair in changes.items():
        stem, layer = name.split(".to_out.0")[0], "to_out"
        if not name.endswith("to_out.0"):
            stem, layer = name.rsplit(".", 1)
        old |= {
            f"{stem}.processor.{layer}_lora.{way}.weight": np.asarray(pair[h])
            for way, h in (("down", "A"), ("up", "B"))
        }
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / lora.FILE)
    pictures = []
    for folder in ("new", "old"):
        pipe.load_lora_weights(tmp_path / folder)
        pictures.append(draw(pipe))
        pipe.unload_lora_weights()
    assert np.array_equal(*pictures)


def test_bad_files_and_names(pipe, tmp_path):
    lora.write(tmp_path, random_lora(pipe.unet, 1), LoraConfig(4), "unet")
    good = load_file(tmp_path / lora.FILE)
    first = next(name for name in good if name.endswith("lora_A.weight"))
    layer = first.removeprefix("unet.").removesuffix(".lora_A.weight")

    def spoilt(**changed) -> None:
        path = tmp_path / "bad.safetensors"
        save_file({k: v for k, v in (good | changed).items() if v is not None}, path)
        pipe.load_lora_weights(path)

    for changed, says in (
        ({first: None}, f"{layer} has lora_B alone"),
        ({first: np.zeros((4, 3), np.float32)}, f"{layer} is .* the layer"),
        ({first: np.full_like(good[first], np.nan)}, f"{layer} is not finite"),
        ({"unet.nowhere.lora_A.weight": good[first]}, "belongs to no layer"),
        ({"text_model.x": good[first]}, "is no LoRA tensor"),
    ):
        with pytest.raises(CheckpointError, match=says):
            spoilt(**changed)
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            pipe.load_lora_weights(tmp_path / path)
    assert pipe.get_active_adapters() == []
    pipe.load_lora_weights(tmp_path, "mine")
    with pytest.raises(ValueError, match="there is an adapter 'mine' already"):
        pipe.load_lora_weights(tmp_path, "mine")
    with pytest.raises(ValueError, match=r"no adapter \['yours'\] is loaded; there are \['mine'\]"):
        pipe.set_adapters("yours")
    with pytest.raises(ValueError, match="2 weights for 1 adapters"):
        pipe.set_adapters("mine", [1.0, 2.0])
    with pytest.raises(ValueError, match="matches none of the linear layers"):
        lora.init(Network.split(pipe.unet)[1], LoraConfig(pattern="nothing"), jax.random.key(0))


def test_what_the_file_tells(pipe, tmp_path):
    changes = random_lora(pipe.unet, 1, rank=2)
    path = lora.write(tmp_path, changes, LoraConfig(2, 8.0), "unet")
    shapes = {name: leaf.shape for name, leaf in flat_params(pipe.unet).items()}
    found, config = lora.read(path, shapes)
    assert (config.rank, config.alpha, config.scale) == (2, 8.0, 4.0)
    assert found.keys() == changes.keys()
    assert all(np.array_equal(found[n][h], changes[n][h]) for n in changes for h in "AB")
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["unet.lora_alpha"] == 8.0
