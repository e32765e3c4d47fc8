"""Folders written by current diffusers load in all their forms, and stale files are not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import kandinsky_jax
from kandinsky_jax import CheckpointError, CLIPTextModelWithProjection, PriorTransformer, load_network
from kandinsky_jax.checkpoint import LazyNetwork, WeightSelection, check_network, flat_params, hub, tensor_files
from kandinsky_jax.models import UNet2DConditionModel
from tests.conftest import SHAPES_MODEL

PRIOR = SHAPES_MODEL / hub.PRIOR
NETWORKS = ("movq", "prior_prior", "text_encoder", "image_encoder")
FORMS = {
    "plain": {},
    "bin": {"safe_serialization": False},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "200KB"},
    "shards of bin": {"max_shard_size": "200KB", "safe_serialization": False},
    "shards of a variant": {"max_shard_size": "200KB", "variant": "fp16"},
    "shards of bin of a variant": {"max_shard_size": "200KB", "variant": "fp16", "safe_serialization": False},
}


def same_numbers(ours, reference) -> bool:
    """Whether a network of ours holds the numbers of a torch state of ours' names, or of another network of ours."""
    params, expected = flat_params(ours), flat_params(reference)
    return params.keys() == expected.keys() and all(
        np.array_equal(np.asarray(params[n], np.float32), np.asarray(expected[n], np.float32)) for n in expected
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_prior_as_diffusers_saves_it(form, reference, shapes_pipe, tmp_path):
    reference[0].save_pretrained(tmp_path / "prior", **FORMS[form])
    assert "CLIPImageProcessorPil" in (tmp_path / "prior/model_index.json").read_text()
    variant = {"variant": "fp16"} if "variant" in form else {}
    pipe = kandinsky_jax.KandinskyV22PriorPipeline.from_pretrained(tmp_path / "prior", dtype="float32", **variant)
    for name in ("prior", "text_encoder", "image_encoder"):
        assert same_numbers(getattr(pipe, name), getattr(shapes_pipe.prior_pipe, name))
    assert pipe.image_processor == shapes_pipe.prior_pipe.image_processor
    prompt = "a Red circle, on a blue background"
    assert pipe.tokenizer(prompt).input_ids == shapes_pipe.prior_pipe.tokenizer(prompt).input_ids


@pytest.mark.parametrize(
    "name",
    [
        "KandinskyV22Pipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22InpaintPipeline",
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        "KandinskyV22PriorEmb2EmbPipeline",
        "KandinskyV22CombinedPipeline",
        "KandinskyV22Img2ImgCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
    ],
)
def test_every_pipeline_as_diffusers_saves_it(name, theirs, ours, tmp_path):
    kind = next((kind for kind in ("Inpaint", "Controlnet", "Prior") if kind in name), "Decoder")
    parts = theirs._components.get(kind, {})
    if kind == "Prior" or "Combined" in name:
        prefix = "" if kind == "Prior" else "prior_"
        parts = parts | {prefix + key: part for key, part in theirs._components["Prior"].items()}
    getattr(diffusers, name)(**parts).save_pretrained(tmp_path / "model")
    network = "prior" if kind == "Prior" else "unet"
    # Everything else that takes time is there already.
    others = {key: part for key, part in ours[name]._held().items() if key.endswith(NETWORKS) and key != network}
    loaded = getattr(kandinsky_jax, name).from_pretrained(tmp_path / "model", dtype="float32", **others)
    assert loaded._component_names == ours[name]._component_names
    assert same_numbers(getattr(loaded, network), getattr(ours[name], network))


@pytest.mark.parametrize(
    "entries",
    [
        {"image_processor": ["transformers", "CLIPImageProcessorFast"]},
        {
            "image_processor": ["transformers", "CLIPFeatureExtractor"],
            "tokenizer": ["transformers", "CLIPTokenizerFast"],
        },
        {"tokenizer": ["transformers", "TokenizersBackend"], "feature_extractor": [None, None], "safety_checker": None},
        {"_diffusers_version": None, "_name_or_path": 3, "requires_safety_checker": False},
    ],
    ids=str,
)
def test_class_names_and_entries_of_other_releases(entries, shapes_pipe, tmp_path):
    folder = tmp_path / "prior"
    shutil.copytree(PRIOR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    networks = {
        n: p for n, p in shapes_pipe.prior_pipe._held().items() if n in ("prior", "text_encoder", "image_encoder")
    }
    pipe = kandinsky_jax.KandinskyV22PriorPipeline.from_pretrained(folder, **networks)
    assert pipe.image_processor == shapes_pipe.prior_pipe.image_processor


# Several files in one folder ---------------------------------------------------------------------------------------


@pytest.fixture
def stale(tmp_path):
    """(folder, write): a prior's folder, and a function that saves it anew, all numbers times a factor."""
    folder = Path(shutil.copytree(PRIOR / "prior", tmp_path / "prior", ignore=shutil.ignore_patterns("*.safetensors")))
    state = {name: t.float() for name, t in load_torch(PRIOR / "prior/diffusion_pytorch_model.safetensors").items()}
    network = diffusers.PriorTransformer.from_config(diffusers.PriorTransformer.load_config(folder))

    def write(factor: float, **form) -> None:
        network.load_state_dict({name: t * factor for name, t in state.items()})
        network.save_pretrained(tmp_path / "other", **form)
        for path in (tmp_path / "other").iterdir():
            if path.name != "config.json":
                path.rename(folder / path.name)

    return folder, write


COMBINATIONS = {
    "a single file, then shards": ({}, FORMS["shards"]),
    "shards, then a single file": (FORMS["shards"], {}),
    "a single file, then a variant": ({}, FORMS["variant"]),
    "safetensors, then bin": ({}, FORMS["bin"]),
    "bin, then shards": (FORMS["bin"], FORMS["shards"]),
    "a variant, then shards of it": (FORMS["variant"], FORMS["shards of a variant"]),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("use_safetensors", [None, False])
def test_of_several_files_those_count_that_diffusers_reads(combination, variant, use_safetensors, stale):
    folder, write = stale
    for factor, form in zip((1.0, 2.0), COMBINATIONS[combination], strict=True):
        write(factor, **form)
    selection = {"variant": variant, "use_safetensors": use_safetensors}
    try:
        theirs = diffusers.PriorTransformer.from_pretrained(folder, **selection, low_cpu_mem_usage=False)
    except OSError:  # where diffusers finds nothing we may take what there is, or say so
        return
    own = load_network(PriorTransformer, folder, selection=WeightSelection(**selection))
    assert np.array_equal(np.asarray(own.proj_in.bias[...]), theirs.proj_in.bias.detach().numpy())


def test_a_single_file_of_transformers_goes_before_shards(tmp_path):
    """The other way round than diffusers; each folder is read as its library reads it."""
    text = transformers.CLIPTextModelWithProjection.from_pretrained(PRIOR / "text_encoder", dtype=torch.float32)
    text.save_pretrained(tmp_path)
    with torch.no_grad():
        text.text_projection.weight *= 2
    text.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    for path in (tmp_path / "shards").glob("model*"):
        path.rename(tmp_path / path.name)
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path)
    own = flat_params(load_network(CLIPTextModelWithProjection, tmp_path))
    assert np.array_equal(own["text_projection.weight"], theirs.text_projection.weight.detach().numpy())


@pytest.mark.parametrize("forms", [("bin", "shards of bin"), ("orbax", "plain")], ids=str)
def test_what_is_ambiguous_is_refused(forms, stale, shapes_pipe):
    folder, write = stale
    for form in forms:
        if form == "orbax":
            kandinsky_jax.save_network(shapes_pipe.prior_pipe.prior, folder, "orbax")
        else:
            write(1.0, **FORMS[form])
    with pytest.raises(CheckpointError, match=r"prior has both .* out of date"):
        check_network(PriorTransformer, folder)


def test_two_variants_need_a_choice(stale):
    folder, write = stale
    write(1.0, variant="fp16")
    assert check_network(PriorTransformer, folder)  # the only one there is
    write(1.0, variant="ema")
    with pytest.raises(CheckpointError, match="has files of the variants ema, fp16 only; choose one with variant="):
        check_network(PriorTransformer, folder)
    assert check_network(PriorTransformer, folder, WeightSelection("ema"))
    with pytest.raises(ValueError, match="variant must be a name"):
        WeightSelection("../fp16")


@pytest.mark.parametrize(("use_safetensors", "form"), [(True, "bin"), (False, "plain"), (True, "shards of bin")])
def test_a_format_that_is_not_wanted_is_not_read(use_safetensors, form, stale):
    folder, write = stale
    write(1.0, **FORMS[form])
    with pytest.raises(CheckpointError, match="prior has no tensors"):
        check_network(PriorTransformer, folder, WeightSelection(use_safetensors=use_safetensors))


# Dtypes ------------------------------------------------------------------------------------------------------------

NOT_OF_WEIGHTS = {
    "float8": torch.float8_e4m3fn,
    "float8 e5m2": torch.float8_e5m2,
    "bool": torch.bool,
    "int8": torch.int8,
    "int64": torch.int64,
    "complex": torch.complex64,
}


@pytest.fixture
def text_folder(tmp_path) -> Path:
    return Path(shutil.copytree(PRIOR / "text_encoder", tmp_path / "text_encoder"))


@pytest.mark.parametrize("dtype", NOT_OF_WEIGHTS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_only_floating_point_dtypes_are_weights(dtype, form, text_folder):
    path = text_folder / "model.safetensors"
    state = load_torch(path)
    name = "text_projection.weight"
    state[name] = state[name].float().to(NOT_OF_WEIGHTS[dtype])
    if form == "bin":
        path.unlink()
        torch.save(state, text_folder / "pytorch_model.bin")
    else:
        save_torch(state, path)
    for action in (check_network, load_network):
        with pytest.raises(CheckpointError, match=rf"1 tensors differ: dtype: {name} is .*, weights are") as raised:
            action(CLIPTextModelWithProjection, text_folder)
        assert str(text_folder) in str(raised.value)


def test_float64_is_taken_where_nothing_is_lost(text_folder):
    path = text_folder / "model.safetensors"
    own = load_network(CLIPTextModelWithProjection, text_folder)
    tensors = {name: array.astype(np.float64) for name, array in load_file(path).items()}
    save_file(tensors, path)
    doubled = load_network(CLIPTextModelWithProjection, text_folder)
    assert {str(array.dtype) for array in flat_params(doubled).values()} == {"float32"}
    assert same_numbers(doubled, own)
    name = min(tensors)
    tensors[name].flat[0] = 0.1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"inexact: {name} has 1 numbers of float64"):
        load_network(CLIPTextModelWithProjection, text_folder)


@pytest.mark.parametrize("dtype", ["bool", "int32", "complex64", "float8_e4m3fn"])
def test_orbax_checkpoints_of_other_dtypes(dtype, text_folder, tmp_path):
    from kandinsky_jax.checkpoint import orbax

    params = flat_params(load_network(CLIPTextModelWithProjection, text_folder))
    params = {name: np.asarray(array) for name, array in params.items()}
    params["text_projection.weight"] = params["text_projection.weight"].astype(getattr(ml_dtypes, dtype, dtype))
    (text_folder / "model.safetensors").unlink()
    orbax.save(text_folder / orbax.FOLDER, params)
    with pytest.raises(CheckpointError, match=r"dtype: text_projection.weight is"):
        load_network(CLIPTextModelWithProjection, text_folder)


def test_tensors_without_numbers_are_refused(text_folder):
    state = load_torch(text_folder / "model.safetensors")
    (text_folder / "model.safetensors").unlink()
    state["text_projection.weight"] = state["text_projection.weight"].float().to_sparse()
    torch.save(state, text_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"sparse, quantized or without data: text_projection.weight"):
        check_network(CLIPTextModelWithProjection, text_folder)


def test_a_tensor_in_two_shards_is_refused(stale):
    folder, write = stale
    write(1.0, **FORMS["shards"])
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(CheckpointError, match=r"index.json names shards that hold the same tensors"):
        check_network(PriorTransformer, folder)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.bin.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
        ("diffusion_pytorch_model-00001-of-00002.bin", None),
        ("config.json", None),
    ],
)
def test_variant_of_a_file_by_its_name(name, variant):
    assert tensor_files.variant_of(name) == variant


# LoRA within a network's files ------------------------------------------------------------------------------------


def test_networks_that_were_saved_with_lora_in_them_are_refused_in_a_sentence(tmp_path):
    """As diffusers saves a UNet to which an adapter was added; its advice makes files that are read."""
    peft = pytest.importorskip("peft")
    unet = diffusers.UNet2DConditionModel.from_pretrained(SHAPES_MODEL / hub.DECODER / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    unet.save_pretrained(tmp_path / "with")
    for read in (load_network, LazyNetwork):
        with pytest.raises(
            CheckpointError, match=f"^{tmp_path}/with was saved with LoRA in it. Save it with"
        ) as raised:
            read(UNet2DConditionModel, tmp_path / "with")
        assert len(str(raised.value)) < 350
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path / "fused")
    fused = flat_params(load_network(UNet2DConditionModel, tmp_path / "fused"))
    plain = flat_params(load_network(UNet2DConditionModel, SHAPES_MODEL / hub.DECODER / "unet"))
    changed = {name for name in plain if not np.array_equal(fused[name], plain[name])}
    assert changed
    assert all("to_q" in name or "to_k" in name for name in changed)


@pytest.mark.parametrize(
    "name", ["mid_block.attentions.0.processor.to_q_lora.down.weight", "text_model.a.to_q.lora_layer.up.weight"]
)
def test_lora_by_its_older_names(name, tmp_path):
    source = SHAPES_MODEL / hub.PRIOR / "text_encoder"
    shutil.copytree(source, tmp_path / "t")
    save_file(load_file(source / "model.safetensors") | {name: np.ones((2, 2))}, tmp_path / "t/model.safetensors")
    with pytest.raises(CheckpointError, match="was saved with LoRA in it"):
        load_network(CLIPTextModelWithProjection, tmp_path / "t")
