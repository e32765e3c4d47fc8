"""Members of diffusers' pipelines: each works, or warns once, or says what to write instead."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import kandinsky_jax
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.models.compatibility import TorchModuleMixin
from tests.conftest import SHAPES_MODEL
from tests.xla_flags import devices

CLASSES = [name for name in dir(diffusers) if name.startswith("KandinskyV22")]
NETWORKS = ("UNet2DConditionModel", "VQModel", "PriorTransformer")
SAVERS = [
    "enable_attention_slicing",
    "enable_group_offload",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_vae_slicing",
    "enable_vae_tiling",
    "enable_xformers_memory_efficient_attention",
    "set_lora_device",
]


@pytest.fixture(scope="module")
def loaded():
    """One of this module's own, because tests convert its networks."""
    return kandinsky_jax.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL, dtype="float32")


@pytest.fixture
def pipe(loaded):
    """Another pipeline of the same networks, which has not warned yet."""
    return type(loaded).from_pipe(loaded)


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_is_there(name):
    wanted = {member for member in dir(getattr(diffusers, name)) if not member.startswith("_")}
    assert not wanted - set(dir(getattr(kandinsky_jax, name)))


@pytest.mark.parametrize("name", SAVERS)
def test_what_saves_memory_warns_once(pipe, name):
    with pytest.warns(UserWarning, match=rf"{name}\(\) has no effect here: .* dtype='bfloat16'"):
        getattr(pipe, name)()
    with warnings.catch_warnings(action="error"):
        getattr(pipe, name)()
        getattr(pipe, name.replace("enable", "disable"), lambda: None)()
        pipe.remove_all_hooks()
        pipe.maybe_free_model_hooks()
        pipe.reset_device_map()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), "changes the images"),
        (lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "changes the images"),
        (lambda pipe: pipe.unet.load_lora_adapter("folder", prefix="unet"), r"call pipe\.load_lora_weights\("),
        (lambda pipe: pipe.unet.load_attn_procs("folder"), r"call pipe\.load_lora_weights\("),
        (lambda pipe: pipe.push_to_hub("owner/name"), "hf upload OWNER/NAME FOLDER"),
        (lambda pipe: pipe.from_config({}), "from_pretrained"),
        (lambda pipe: pipe.prepare_latents((1, 4, 8, 8)), "give latents= to the call"),
        (lambda pipe: pipe.load_ip_adapter("x"), "interpolate"),
        (lambda pipe: pipe.lora_state_dict("x"), "load_lora_weights reads"),
        (lambda _: kandinsky_jax.KandinskyPipeline.from_pretrained("x"), "write KandinskyV22Pipeline; its decoder"),
        (lambda _: kandinsky_jax.KandinskyImg2ImgCombinedPipeline(), "write KandinskyV22Img2ImgCombinedPipeline"),
    ],
)
def test_what_is_not_supported_says_what_is(pipe, call, says):
    with pytest.raises(NotImplementedError, match=says):
        call(pipe)


# Of one class's bookkeeping, constants of PyTorch, and what transformers puts into its modules.
NO_MEMBERS = {"smart_apply", "T_destination", "call_super_init", "dump_patches", "text_encoder_name", "unet_name"}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_public_member_of_a_network_is_there_or_named(name, loaded, ours):
    held = {**ours["KandinskyV22PriorPipeline"].components, **loaded.components}.values()
    network = next(part for part in held if type(part).__name__ == name)
    for member in dir(getattr(diffusers, name)):
        if member.startswith("_") or member in NO_MEMBERS or hasattr(network, member):
            continue
        with pytest.raises(AttributeError, match=rf"^{name} has no '{member}': [a-zA-Z].{{15,250}}$"):
            getattr(network, member)
    with pytest.raises(AttributeError, match=f"^{name} has no 'anything'$"):
        _ = network.anything


def test_networks_count_and_convert(pipe, ours):
    text_encoder = ours["KandinskyV22PriorPipeline"].text_encoder
    reference = transformers.CLIPTextModelWithProjection.from_pretrained(SHAPES_MODEL / hub.PRIOR / "text_encoder")
    for excluded in (False, True):
        assert text_encoder.num_parameters(exclude_embeddings=excluded) == reference.num_parameters(
            exclude_embeddings=excluded
        )
    assert pipe.unet.num_parameters(only_trainable=True) * 4 == pipe.unet.get_memory_footprint()
    assert pipe.num_parameters() == pipe.unet.num_parameters() + pipe.movq.num_parameters()
    assert pipe.movq_scale_factor == 8
    assert pipe.unet.eval() is pipe.unet.train() is pipe.unet
    assert pipe.unet.half().dtype == np.float16
    assert pipe.unet.bfloat16().dtype == jax.numpy.bfloat16
    assert pipe.unet.float().cpu().dtype == np.float32
    with pytest.warns(UserWarning, match="there is no cuda device here"):
        assert pipe.unet.cuda() is pipe.unet


def test_from_pipe_takes_what_from_pretrained_takes(pipe):
    assert type(pipe).from_pipe(pipe, safety_checker=None).unet is pipe.unet
    with pytest.raises(TypeError, match="two names of one argument"):
        type(pipe).from_pipe(pipe, dtype="float32", torch_dtype="float32")


def test_networks_take_what_modules_of_torch_take(pipe):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert pipe.unet.to(memory_format=torch.channels_last) is pipe.unet
            pipe.unet.set_attn_processor(None)
            pipe.unet.enable_xformers_memory_efficient_attention()
            pipe.movq.enable_tiling()
            assert pipe.unet.requires_grad_(False) is pipe.unet
    assert len(seen) == 3
    assert sum("with_attention(network, function)" in str(warning.message) for warning in seen) == 1
    reference = diffusers.UNet2DConditionModel.from_pretrained(SHAPES_MODEL / hub.DECODER / "unet")
    assert pipe.unet.num_parameters() == reference.num_parameters()
    assert pipe.unet.device == jax.devices()[0]
    assert all(issubclass(getattr(kandinsky_jax, name), TorchModuleMixin) for name in NETWORKS)


def test_the_configuration_is_model_index_json(pipe, tmp_path):
    index = json.loads((SHAPES_MODEL / hub.DECODER / "model_index.json").read_text())
    assert {name: list(pipe.config[name]) for name in ("unet", "scheduler", "movq")} == {
        name: index[name] for name in ("unet", "scheduler", "movq")
    }
    assert pipe.config.unet == ("diffusers", "UNet2DConditionModel")
    assert pipe.scheduler.config.num_train_timesteps == pipe.scheduler.config["num_train_timesteps"] == 1000
    with pytest.raises(AttributeError, match="no 'vae'; it has _class_name"):
        _ = pipe.config.vae
    pipe.save_config(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "KandinskyV22Pipeline"
    assert pipe.load_config(SHAPES_MODEL)["_class_name"] == index["_class_name"]
    assert pipe.name_or_path == str(SHAPES_MODEL / hub.DECODER)
    assert pipe.parameters == {}
    assert type(pipe)(**pipe.components, **pipe.parameters).unet is pipe.unet


def test_the_text_of_a_pipeline_names_its_parts(ours):
    text = repr(ours["KandinskyV22CombinedPipeline"])
    assert "unet: UNet2DConditionModel, " in text
    assert "parameters, float32 on " in text
    assert "prior_image_encoder: CLIPVisionModelWithProjection" in text
    assert len(text) < 1500


def test_to_converts_and_moves(pipe):
    assert pipe.to(torch.float16) is pipe
    assert pipe.dtype == np.float16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(pipe.movq, nnx.Param))} == {np.dtype("float16")}
    assert pipe.to("cpu", torch.float32).dtype == np.float32
    assert pipe.to(dtype="bfloat16").dtype == jax.numpy.bfloat16
    assert pipe.to(device=torch.device("cpu"), dtype=np.float32).dtype == np.float32
    assert pipe.to(jax.devices()[0]).device == jax.devices()[0]
    assert pipe.to(pipe.device).to(pipe.dtype).dtype == np.float32


def test_a_device_that_is_not_here_is_another_accelerator(pipe):
    with pytest.warns(UserWarning, match="there is no cuda device here; KandinskyV22Pipeline stays on JAX's, cpu"):
        assert pipe.to("cuda") is pipe
    with warnings.catch_warnings(action="error"):
        pipe.to("cuda")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (("tpu",), ValueError, "there is no tpu device here; there are cpu"),
        (("float64",), ValueError, "dtype float64 is not supported, only float32, bfloat16 and float16"),
        ((torch.int8,), ValueError, "dtype torch.int8 is not supported"),
        (("disk",), ValueError, "disk is not a device; give cpu, or a dtype"),
        (("cpu:9",), ValueError, "cpu:9 is not here; there are 1 cpu devices, counted from 0"),
        (("cpu:" + "9" * 5000,), ValueError, r"cpu:99*\.\.\. is not a device"),
        ((10**5000,), ValueError, "a int too large to show is not a device"),
        (("cpu", "cpu"), TypeError, "one device and one dtype"),
    ],
    ids=lambda value: shorten(value, 40),
)
def test_to_says_what_there_is(pipe, given, error, says):
    if "cpu:9" in given and len(jax.devices()) > 1:
        pytest.skip("for one device")
    with pytest.raises(error, match=says):
        pipe.to(*given)


def test_a_networks_configuration_is_read_as_the_references(pipe):
    """By name, as attributes, and as a mapping; also the fields that have one value here."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(SHAPES_MODEL / hub.DECODER / "unet").config
    ours = pipe.unet.config
    for name in ("in_channels", "act_fn", "block_out_channels", "_class_name"):
        wanted = list(theirs[name]) if isinstance(theirs[name], tuple | list) else theirs[name]
        given = [ours[name], getattr(ours, name), ours.get(name), dict(ours)[name], {**ours}[name]]
        assert [list(x) if isinstance(x, tuple | list) else x for x in given] == [wanted] * 5
        assert name in ours
    assert ours.get("nothing", 7) == 7
    assert "nothing" not in ours
    with pytest.raises(AttributeError, match="configuration of a UNet2DConditionModel has no 'nothing'"):
        _ = ours.nothing
    assert hash(ours) == hash(type(ours).from_dict(ours))
    assert ours == type(ours).from_dict(ours)


def test_from_pipe_converts_as_the_auto_classes_do():
    pipe = kandinsky_jax.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    for name in ("dtype", "torch_dtype"):
        other = kandinsky_jax.KandinskyV22Img2ImgPipeline.from_pipe(pipe, **{name: torch.bfloat16})
        assert other.unet.dtype.name == other.movq.dtype.name == "bfloat16"
        assert other.unet is pipe.unet
        pipe.to("float32")


def test_the_progress_bar_is_configured_as_the_pipelines_own(pipe, capsys):
    pipe.set_progress_bar_config(desc="steps", leave=True)
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    with pipe.progress_bar(total=3) as bar:
        bar.update(3)
    assert capsys.readouterr().err.count("steps") >= 2
    with pytest.raises(ValueError, match="an iterable or a total"):
        pipe.progress_bar()


def test_numpy_to_pil_is_the_references(pipe):
    for shape in ((2, 4, 5, 3), (4, 5, 3), (2, 4, 5, 1)):
        pixels = np.random.default_rng(0).random(shape, np.float32)
        ours, theirs = pipe.numpy_to_pil(pixels), diffusers.DiffusionPipeline.numpy_to_pil(pixels)
        assert [np.asarray(x).tolist() for x in ours] == [np.asarray(x).tolist() for x in theirs]


def test_the_zero_embedding_is_public(ours):
    prior = ours["KandinskyV22PriorPipeline"]
    assert prior.get_zero_embed(2).shape == (2, prior.prior.config.embedding_dim)


@pytest.mark.slow
def test_to_moves_to_one_of_several_devices():
    worker = Path(__file__).parent / "move_worker.py"
    environment = os.environ | {"XLA_FLAGS": devices(2), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, worker, SHAPES_MODEL], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "moved"


def test_the_names_of_loras_arguments_are_diffusers():
    """Calls that pass them by name need no change."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    for method in ("load_lora_weights", "set_adapters", "delete_adapters", "fuse_lora", "unfuse_lora"):
        theirs = inspect.signature(getattr(StableDiffusionLoraLoaderMixin, method, getattr(LoraBaseMixin, method)))
        ours = inspect.signature(getattr(kandinsky_jax.KandinskyV22Pipeline, method)).parameters
        wanted = [n for n, p in theirs.parameters.items() if p.kind is not p.VAR_KEYWORD]
        assert [n for n in wanted if n not in ours and "text_encoder" not in n and "fuse_" not in n] == []
