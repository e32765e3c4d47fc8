"""LoRA in pipelines gives the same weights as in diffusers after the same calls."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from kandinsky_jax import (
    CheckpointError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    TorchGenerator,
    lora,
)
from kandinsky_jax.checkpoint import flat_params, hub, lora_files, tensor_names
from kandinsky_jax.lora import FILE, LayerChange
from tests.checkpoint.test_hub import cached
from tests.conftest import SHAPES_MODEL, note
from tests.pipelines.test_compile import compilations
from tests.xla_flags import devices

PROMPT = "a red circle on a blue background"
SIZE = {"height": 64, "width": 64, "output_type": "np"}
STEPS = {"num_inference_steps": 8, "prior_num_inference_steps": 5}
# peft says that a network has several adapters, and that none is active after the last.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:peft") for kind in ("UserWarning", "RuntimeWarning")]
TARGETS = ["to_q", "to_v", "to_out.0", "conv1"]


@pytest.fixture(scope="module")
def loaded() -> KandinskyV22CombinedPipeline:
    """A pipeline of one's own: its weights will change."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    """The pipeline without LoRA, before and after."""
    before = {name: np.asarray(leaf) for name, leaf in flat_params(loaded.unet).items()}
    yield loaded
    loaded.unfuse_lora()
    loaded.unload_lora_weights()
    assert all(np.array_equal(leaf, before[name]) for name, leaf in flat_params(loaded.unet).items())


@pytest.fixture(scope="module")
def unet():
    return diffusers.UNet2DConditionModel.from_pretrained(SHAPES_MODEL / hub.DECODER / "unet")


@pytest.fixture(scope="module")
def folders(unet, tmp_path_factory) -> dict[str, Path]:
    """Three files of diffusers, of other ranks and strengths."""
    found = {}
    for i, name in enumerate("abc"):
        twin = copy.deepcopy(unet)
        twin.add_adapter(peft.LoraConfig(r=2 + i, lora_alpha=1, use_rslora=i == 1, target_modules=TARGETS[: 4 - i]))
        randomize(twin, i)
        found[name] = tmp_path_factory.mktemp(name)
        twin.save_lora_adapter(found[name])
    return found


def randomize(network: torch.nn.Module, seed: int, size: float = 0.1) -> None:
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn_like(parameter)


def random_changes(module, seed: int, rank: int = 4, size: float = 0.2) -> dict[str, LayerChange]:
    """Changes of the attention that can be seen."""
    rng = np.random.default_rng(seed)
    return {
        name: LayerChange(
            rng.standard_normal((rank, shape[1])).astype(np.float32) / rank,
            (size * rng.standard_normal((shape[0], rank))).astype(np.float32),
        )
        for name, shape in lora_files.layers_of(flat_params(module)).items()
        if re.search(lora.ATTENTION, name)
    }


def weights_of(module) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flat_params(module).items()}


def their_weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """What each layer of a network multiplies by, as peft's forward pass has it, by our names."""
    found = {}
    for name, module in network.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.disable_adapters and module.merged:
            module.unmerge()
        weight = module.get_base_layer().weight.detach().clone()
        if not module.disable_adapters and not module.merged:
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    weight += module.get_delta_weight(adapter)
        found[name + (".kernel" if weight.ndim == 4 else ".weight")] = weight.detach().numpy()
    return {name: tensor_names.to_flax(name, array) for name, array in found.items()}


def same_weights(module, before: dict, network: torch.nn.Module) -> None:
    """Ours are theirs, and what they do not change is as it was."""
    theirs, ours = their_weights(network), weights_of(module)
    for name, array in ours.items():
        expected = theirs.get(name, before[name])
        difference = np.abs(array - expected).max()
        assert difference <= 2e-6 * max(1.0, np.abs(expected).max()), name


# What diffusers' networks are called upon to do, and our pipelines; after each step the weights are compared.
CALLS = [
    ("load", ["a"]),
    ("set_adapters", ["a"], [0.5]),
    ("load", ["b"]),  # active alone
    ("set_adapters", ["a", "b"], [0.7, -0.3]),
    ("disable_lora",),
    ("enable_lora",),
    ("set_adapters", "b"),
    ("load", ["c"]),
    ("set_adapters", ["a", "b", "c"], 0.25),
    ("set_adapters", ["c", "a"], None),
    ("delete_adapters", "a"),
    ("fuse_lora",),
    ("disable_lora",),
    ("enable_lora",),
    ("unfuse_lora",),
    ("set_adapters", ["b", "c"], [1.0, 2.0]),
    ("fuse_lora_of", ["b"]),
    ("unfuse_lora",),
    ("delete_adapters", ["b", "c"]),
]


@pytest.mark.slow
def test_the_same_calls_as_diffusers_networks(pipe, unet, folders):
    before, twin = weights_of(pipe.unet), copy.deepcopy(unet)
    for method, *arguments in CALLS:
        if method == "load":
            [name] = arguments[0]
            twin.load_lora_adapter(folders[name], prefix=None, weight_name=FILE, adapter_name=name)
            pipe.load_lora_weights(folders[name], adapter_name=name)
            assert pipe.get_active_adapters() == twin.active_adapters() == [name]
        elif method == "fuse_lora_of":
            twin.fuse_lora(adapter_names=arguments[0])
            pipe.fuse_lora(adapter_names=arguments[0])
            assert pipe.fused_loras == {"b"}
        else:
            getattr(twin, method)(*arguments)
            getattr(pipe, method)(*arguments)
        same_weights(pipe.unet, before, twin)
        if hasattr(twin, "peft_config"):
            assert pipe.get_list_adapters() == {"unet": list(twin.peft_config)}
    assert pipe.get_list_adapters() == {}
    assert all(np.array_equal(array, before[name]) for name, array in weights_of(pipe.unet).items())


BLOCKS = [
    {"down": 0.5, "mid": 0.25, "up": {"block_0": 0.1, "block_1": [0.2, 0.3]}},
    {"up": {"block_1": 2}},
    {"mid": [3.0], "up": 0.0},
    {"down": {"block_1": [0.5]}},
]


def test_weights_of_blocks_are_diffusers(pipe, unet, folders):
    """Of attention layers, and of what stands beside it; fused they are the same."""
    before, twin = weights_of(pipe.unet), copy.deepcopy(unet)
    for name in "bc":
        twin.load_lora_adapter(folders[name], prefix=None, weight_name=FILE, adapter_name=name)
        pipe.load_lora_weights(folders[name], name)
    for blocks in BLOCKS:
        twin.set_adapters(["b", "c"], [copy.deepcopy(blocks), 0.5])
        pipe.set_adapters(["b", "c"], [{"unet": blocks}, 0.5])
        same_weights(pipe.unet, before, twin)
    twin.fuse_lora(lora_scale=0.5)
    pipe.fuse_lora(lora_scale=0.5)
    same_weights(pipe.unet, before, twin)


def test_weights_of_the_priors_layers(pipe, tmp_path):
    changes = random_changes(pipe.prior_prior, 2)
    before = weights_of(pipe.prior_prior)
    lora_files.write(tmp_path, {"prior": changes})
    pipe.load_lora_weights(tmp_path, "one")
    pipe.set_adapters("one", {"prior": {"transformer_blocks.0.": 0.5, "to_q": 0.0}})
    now = weights_of(pipe.prior_prior)
    for layer, change in changes.items():
        weight = 0.5 if "blocks.0." in layer else 0.0 if "to_q" in layer else 1.0
        np.testing.assert_allclose(now[f"{layer}.weight"], before[f"{layer}.weight"] + change.delta(weight), atol=1e-6)
    for half in (
        np.float32(0.5),
        np.array(0.5),
        jax.numpy.array(0.5),
        torch.tensor(0.5),
        np.array([0.5]),
        jax.numpy.array([0.5]),
    ):
        pipe.set_adapters("one", half)
        layer = next(iter(changes))
        wanted = before[f"{layer}.weight"] + changes[layer].delta(0.5)
        np.testing.assert_allclose(weights_of(pipe.prior_prior)[f"{layer}.weight"], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="the prior has no layer with nowhere in its name"):
        pipe.set_adapters("one", {"prior": {"nowhere": 0.5}})


def test_arguments_that_cannot_be(pipe, tmp_path):
    changes = random_changes(pipe.prior_prior, 3)
    lora_files.write(tmp_path, {"prior": changes})
    pipe.load_lora_weights(tmp_path, "one")
    before = weights_of(pipe.prior_prior)
    for weight in (10**400, 1e39, b"1", "1", True, float("nan"), {"prior": 10**400}):
        with pytest.raises(ValueError, match="needed is a finite number"):
            pipe.set_adapters("one", weight)
    with pytest.raises(ValueError, match=r"is '0\.5', needed is a finite number"):
        pipe.set_adapters("one", "0.5")
    for wrong in (None, 5, b"one", [1]):
        for call in (pipe.set_adapters, pipe.delete_adapters):
            with pytest.raises(TypeError, match="adapters are named by a string or a list of strings"):
                call(wrong)
    arrays = {f"prior.{name}.lora_A.weight": change.down for name, change in changes.items()}
    for metadata in (5, [], "x", {1: 2}):
        with pytest.raises(TypeError, match="metadata must be a dictionary of peft's fields"):
            pipe.load_lora_weights(arrays, "two", metadata=metadata)
    for name in ("../out.safetensors", "/out.safetensors", "a/../../out.safetensors", "", "\0", 5):
        with pytest.raises(ValueError, match="weight_name must be a file's name within the folder"):
            pipe.save_lora_weights(tmp_path / "in", "one", weight_name=name)
        with pytest.raises(ValueError, match="weight_name must be a file's name within the folder"):
            pipe.load_lora_weights(tmp_path, "three", weight_name=name)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        pipe.save_lora_weights(tmp_path / "in", "one", weight_name="a.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]
    now = weights_of(pipe.prior_prior)
    assert all(np.array_equal(now[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_hub_repository_in_the_cache(pipe, folders, tmp_path):
    """Its usual file, one by name, and peft's with its configuration."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "style.safetensors").write_bytes((folders["a"] / FILE).read_bytes())
    (source / "sub" / FILE).write_bytes((folders["b"] / FILE).read_bytes())
    cached(tmp_path / "cache", "owner/lora", source)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipe.load_lora_weights("owner/lora", "a", **options)
    first = weights_of(pipe.unet)
    pipe.load_lora_weights(folders["a"], "local")
    assert all(np.array_equal(array, first[name]) for name, array in weights_of(pipe.unet).items())
    pipe.load_lora_weights("owner/lora", "b", subfolder="sub", **options)
    pipe.load_lora_weights("owner/lora", "c", weight_name="style.safetensors", **options)
    assert all(np.array_equal(array, first[name]) for name, array in weights_of(pipe.unet).items())
    with pytest.raises(CheckpointError, match="owner/absent is not in the Hub's cache"):
        pipe.load_lora_weights("owner/absent", **options)


@pytest.mark.slow
def test_fused_weights_stay_when_adapters_are_unloaded(folders, unet):
    pipe = KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    before, twin = weights_of(pipe.unet), copy.deepcopy(unet)
    for each, load in ((twin, twin.load_lora_adapter), (pipe, pipe.load_lora_weights)):
        load(folders["a"], adapter_name="a", weight_name=FILE, **({"prefix": None} if each is twin else {}))
        each.fuse_lora(lora_scale=0.7)
    same_weights(pipe.unet, before, twin)
    merged = weights_of(pipe.unet)
    with pytest.raises(ValueError, match="fused; call unfuse_lora first"):
        pipe.delete_adapters("a")
    pipe.unload_lora_weights()
    assert all(np.array_equal(array, merged[name]) for name, array in weights_of(pipe.unet).items())
    assert pipe.get_list_adapters() == {}
    assert pipe.num_fused_loras == 0
    pipe.load_lora_weights(folders["b"])
    pipe.unload_lora_weights()
    assert all(np.array_equal(array, merged[name]) for name, array in weights_of(pipe.unet).items())


def test_names_and_weights_of_two_networks(pipe, tmp_path):
    """A file for both; default names; weights by component; both stay active beside each other."""
    parts = {"unet": random_changes(pipe.unet, 1), "prior": random_changes(pipe.prior_prior, 2)}
    before = {"unet": weights_of(pipe.unet), "prior": weights_of(pipe.prior_prior)}
    lora_files.write(tmp_path / "both", parts)
    lora_files.write(tmp_path / "prior", {"prior": parts["prior"]}, "other.safetensors")
    pipe.load_lora_weights(tmp_path, subfolder="both", weight=0.5)
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "prior_prior": ["default_0"]}
    pipe.load_lora_weights(tmp_path / "prior")
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "prior_prior": ["default_0", "default_1"]}
    assert pipe.get_active_adapters() == ["default_0", "default_1"]

    def check(of_unet: float, of_prior: float) -> None:
        for part, module, amount in (("unet", pipe.unet, of_unet), ("prior", pipe.prior_prior, of_prior)):
            now = weights_of(module)
            for layer, change in parts[part].items():
                name = f"{layer}.weight"
                np.testing.assert_allclose(now[name], before[part][name] + change.delta(amount), atol=1e-6)

    check(0.5, 1.0)
    pipe.set_adapters(["default_0", "default_1"], [{"unet": 0.25, "prior": 0.125}, 2])
    check(0.25, 2.125)
    pipe.set_adapters("default_0", {"prior_prior": 0.5})
    check(1.0, 0.5)
    with pytest.warns(UserWarning, match=r"'default_1' for \['unet'\] are not used: it changes \['prior_prior'\] only"):
        pipe.set_adapters("default_1", {"unet": 3.0, "prior": 0.25})
    check(0.0, 0.25)
    pipe.set_adapters([])
    check(0.0, 0.0)
    assert pipe.get_active_adapters() == []
    pipe.set_adapters(["default_0"], np.array([0.5], np.float32))
    pipe.fuse_lora(components=["unet"])
    pipe.set_adapters([])
    check(0.5, 0.0)
    pipe.unfuse_lora(components=["prior"])
    check(0.5, 0.0)
    pipe.unfuse_lora()
    check(0.0, 0.0)
    decoder = pipe.decoder_pipe
    with pytest.warns(UserWarning, match="also changes .* layers of a prior, which are left out"):
        decoder.load_lora_weights(tmp_path / "both" / FILE, "again")
    with pytest.raises(CheckpointError, match="is for a prior, and this pipeline has none"):
        decoder.load_lora_weights(tmp_path / "prior")


def test_loading_compiles_nothing(pipe, folders):
    flat_params(pipe.unet)
    with compilations() as events:
        pipe.load_lora_weights(folders["a"], "one")
        pipe.load_lora_weights(folders["b"], "two")
        pipe.set_adapters(["one", "two"], [0.5, 2.0])
        pipe.fuse_lora()
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    assert not events


def test_dictionaries_of_arrays(pipe, unet, folders):
    """Of PyTorch in any dtype, and of JAX."""
    twin = copy.deepcopy(unet)
    twin.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))
    randomize(twin, 5)
    state = peft.get_peft_model_state_dict(twin)
    config = {"r": 2, "lora_alpha": 3}
    pipe.load_lora_weights({k: torch.nn.Parameter(v) for k, v in state.items()}, "torch", metadata=config)
    expected = weights_of(pipe.unet)
    pipe.load_lora_weights({k: jax.numpy.asarray(v.numpy()) for k, v in state.items()}, "jax", metadata=config)
    assert all(np.array_equal(array, expected[name]) for name, array in weights_of(pipe.unet).items())
    pipe.load_lora_weights({k: v.to(torch.bfloat16) for k, v in state.items()}, "bfloat16", metadata=config)
    with pytest.raises(CheckpointError, match="the dictionary of LoRA holds"):
        pipe.load_lora_weights({"x.lora_A.weight": "text"})
    with pytest.raises(ValueError, match="metadata is for a dictionary"):
        pipe.load_lora_weights(folders["a"], metadata=config)


def test_saving_an_adapter(pipe, unet, folders, tmp_path):
    pipe.load_lora_weights(folders["b"], "b", weight=0.3)
    path = pipe.save_lora_weights(tmp_path)
    assert path == tmp_path / FILE
    first, second = copy.deepcopy(unet), copy.deepcopy(unet)
    first.load_lora_adapter(folders["b"], prefix=None, weight_name=FILE)
    second.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE)
    theirs = their_weights(second)
    for name, array in their_weights(first).items():
        np.testing.assert_allclose(theirs[name], array, atol=1e-6)
    pipe.load_lora_weights(folders["a"], "a")
    with pytest.raises(ValueError, match="there are 2 adapters"):
        pipe.save_lora_weights(tmp_path)
    assert pipe.save_lora_weights(tmp_path, "a", "x.safetensors").name == "x.safetensors"
    with pytest.raises(ValueError, match="only safetensors"):
        pipe.save_lora_weights(tmp_path, "a", safe_serialization=False)


def test_hotswap(pipe, folders):
    with pytest.raises(ValueError, match="there is no adapter 'a' already"):
        pipe.load_lora_weights(folders["a"], "a", hotswap=True)
    pipe.load_lora_weights(folders["b"], "a")
    expected = weights_of(pipe.unet)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folders["a"], "a")
    pipe.load_lora_weights(folders["b"], "a", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["a"]}
    assert all(np.array_equal(array, expected[name]) for name, array in weights_of(pipe.unet).items())


def test_pipelines_that_share_a_network_share_its_lora(pipe, folders):
    other = KandinskyV22Pipeline.from_pipe(pipe)
    pipe.load_lora_weights(folders["a"])
    assert other.get_active_adapters() == ["default_0"]
    other.unload_lora_weights()
    assert pipe.get_active_adapters() == []


def test_wrong_arguments(pipe, folders, tmp_path):
    before = weights_of(pipe.unet)
    pipe.load_lora_weights(folders["a"], "mine")
    pipe.set_adapters([])
    for call, says in (
        (lambda: pipe.load_lora_weights(folders["a"], "mine"), "there is an adapter 'mine' already"),
        (lambda: pipe.load_lora_weights(folders["a"], ""), "needed is a name"),
        (lambda: pipe.load_lora_weights(folders["a"], weight=float("nan")), "weight is nan, needed is a finite number"),
        (lambda: pipe.load_lora_weights(folders["a"], hotswap=True), "hotswap needs adapter_name="),
        (lambda: pipe.load_lora_weights(tmp_path / "absent"), "is not a file or folder here and no Hub repository"),
        (lambda: pipe.load_lora_weights(tmp_path), "holds no LoRA file"),
        (lambda: pipe.load_lora_weights(__file__), "test_adapters.py holds no tensors; needed is .safetensors or"),
        (lambda: pipe.load_lora_weights(folders["a"], weight_name="x.bin"), "x.bin is not there"),
        (lambda: pipe.load_lora_weights(folders["a"], subfolder="x"), "x is not there"),
        (lambda: pipe.set_adapters("yours"), r"no adapter \['yours'\] is loaded; there are \['mine'\]"),
        (lambda: pipe.set_adapters("mine", [1.0, 2.0]), "2 weights for 1 adapters"),
        (lambda: pipe.set_adapters("mine", "much"), "weight in the unet is 'much'"),
        (lambda: pipe.set_adapters("mine", True), "weight in the unet is True"),
        (lambda: pipe.set_adapters("mine", {"text_encoder": 1.0}), "weights for .'text_encoder'.*has LoRA in"),
        (lambda: pipe.set_adapters("mine", {"unet": {"side": 1.0}}), r"the unet has no blocks \['side'\]"),
        (lambda: pipe.set_adapters("mine", {"unet": {"up": {"block_9": 1.0}}}), "no attention in up.*block_9"),
        (lambda: pipe.set_adapters("mine", {"unet": {"down": [1.0, 2.0, 3.0]}}), "3 weights for 1 attentions in down"),
        (lambda: pipe.set_adapters("mine", {"unet": {"mid": None}}), "mid of the unet is None, needed is a finite"),
        (lambda: pipe.set_adapters("mine", 1e39), "is 1e.39, needed is a finite number that float32 holds"),
        (lambda: pipe.delete_adapters("yours"), "no adapter"),
        (lambda: pipe.fuse_lora(components=["movq"]), "has no LoRA in"),
        (lambda: pipe.fuse_lora(lora_scale=float("inf")), "lora_scale is inf"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert len(str(caught.value)) < 500
        assert all(np.array_equal(array, before[name]) for name, array in weights_of(pipe.unet).items())
    assert pipe.get_list_adapters() == {"unet": ["mine"]}
    huge = {layer: LayerChange(c.down * 1e20, c.up * 1e20) for layer, c in random_changes(pipe.unet, 1).items()}
    lora_files.write(tmp_path, {"unet": huge})
    with pytest.raises(CheckpointError, match=f"{FILE} makes .* too large for float32"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {"unet": ["mine"]}
    prior_only = KandinskyV22PriorPipeline.from_pipe(pipe.prior_pipe)
    with pytest.raises(CheckpointError, match="for another network"):
        prior_only.load_lora_weights(folders["a"])


@pytest.mark.slow
def test_weights_on_a_mesh_stay_where_they_are(folders):
    environment = os.environ | {"XLA_FLAGS": devices(4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, Path(__file__).parent / "adapters_mesh_worker.py", SHAPES_MODEL, folders["a"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# Pictures ---------------------------------------------------------------------------------------------------------


def picture(pipe, **extra) -> np.ndarray:
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


def test_a_picture_with_lora_of_both_networks(pipe, reference, tmp_path):
    """The reference's picture from the same file; nothing compiles for it; without it, the picture as it was."""
    plain = picture(pipe)
    parts = {"unet": random_changes(pipe.unet, 1), "prior": random_changes(pipe.prior_prior, 2)}
    lora_files.write(tmp_path, parts)
    with compilations() as events:
        pipe.load_lora_weights(tmp_path)
        ours = picture(pipe)
        pipe.unload_lora_weights()
        again = picture(pipe)
    assert not events
    assert np.array_equal(again, plain)
    assert np.abs(ours - plain).mean() * 255 > 1
    networks = {"unet": copy.deepcopy(reference[1].unet), "prior": copy.deepcopy(reference[0].prior)}
    for name, network in networks.items():
        network.load_lora_adapter(tmp_path, prefix=name, weight_name=FILE)
    difference = np.abs(ours - their_picture(reference, **networks)) * 255
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4
