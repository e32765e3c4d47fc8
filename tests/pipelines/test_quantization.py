"""Quantized networks in pipelines: calibrated, saved, loaded, converted; damaged ones refused."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from kandinsky_jax import (
    CheckpointError,
    ConfigError,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
    load_network,
    save_network,
)
from kandinsky_jax.batch import load_pipeline
from kandinsky_jax.checkpoint import flat_params, hub, lora_files
from kandinsky_jax.checkpoint.fingerprint import weights_fingerprint
from kandinsky_jax.checkpoint.manifest import verify
from kandinsky_jax.checkpoint.quantization import quantize_network
from kandinsky_jax.models.quantized import dequantize_weight, quantized_layers
from kandinsky_jax.pipelines.quantization import as_list, calibrate, convert_quantized, read_prompts
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from tests.batch.test_jobs import PROMPTS, job_of, members, run_job
from tests.conftest import SHAPES_MODEL, note, slow_and_campaign
from tests.pipelines.test_adapters import random_changes, weights_of

app = importlib.import_module("convert_weights.__main__").app
del sys.modules["convert_weights.__main__"]  # other tests run it as a program, which must not be imported already


CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "prior_num_inference_steps": 3, "output_type": "np"}


def again(pipe):
    """Another pipeline of the same networks, whose own are replaced without changing the first one's."""
    new = type(pipe)(**pipe._held())
    new.set_progress_bar_config(disable=True)
    return new


@pytest.fixture(scope="module")
def quantized(shapes_pipe) -> KandinskyV22CombinedPipeline:
    """The model of shapes, calibrated by two of its own prompts."""
    pipe = again(shapes_pipe)
    pipe.quantize(prompts=PROMPTS[:2])
    return pipe


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "model"
    quantized.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def prior_folder(shapes_pipe, tmp_path_factory) -> Path:
    """A quantized prior by itself, with scales that nothing has calibrated."""
    prior = shapes_pipe.prior_prior
    names = [name.rpartition(".")[0] for name in flat_params(prior)]
    target = tmp_path_factory.mktemp("prior") / "prior"
    save_network(quantize_network(prior, dict.fromkeys(names, (-1.0, 5.0))), target)
    return target


def same_weights(one, other) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    return all(ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours)


# Calibration ------------------------------------------------------------------------------------------------------


def test_calibration_finds_what_each_layer_gets(shapes_pipe):
    ranges = calibrate(shapes_pipe.prior_pipe, PROMPTS[:2], num_inference_steps=2)
    assert list(ranges) == ["prior"]
    layers = [name for name, _ in quantized_layers(quantize_network(shapes_pipe.prior_prior, ranges["prior"]))]
    assert sorted(ranges["prior"]) == sorted(layers)
    # A layer norm's output goes into all three projections of an attention.
    inputs = [ranges["prior"][f"transformer_blocks.0.attn1.to_{name}"] for name in "qkv"]
    assert len(set(inputs)) == 1
    assert -100 < inputs[0][0] < 0 < inputs[0][1] < 100


def test_a_decoder_needs_a_prior(shapes_pipe):
    decoder = KandinskyV22Pipeline(**shapes_pipe.decoder_pipe._held())
    with pytest.raises(ValueError, match=r"needs image embeddings to be calibrated: .*quantize\(prior="):
        decoder.quantize()
    with pytest.raises(ValueError, match="prior= is for decoders"):
        again(shapes_pipe).quantize(prior=shapes_pipe.prior_pipe)


def test_what_cannot_be_quantized(shapes_pipe, quantized):
    pipe = again(shapes_pipe)
    with pytest.raises(ValueError, match="'int4' is not supported, only int8, float8_e4m3fn"):
        pipe.quantize("int4")
    with pytest.raises(ValueError, match=r"prior_text_encoder.* cannot be quantized"):
        pipe.quantize(components=["prior_text_encoder"])
    with pytest.raises(ValueError, match="the unet is quantized already: leave it out"):
        quantized.quantize()
    with pytest.raises(ValueError, match="calibration has no inputs of transformer_blocks"):
        quantize_network(shapes_pipe.prior_prior, {})


def test_adapters_are_fused_first(tmp_path):
    pipe = KandinskyV22PriorPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    file = lora_files.write(tmp_path, {"prior": random_changes(pipe.prior, 0)}, "lora.safetensors")
    pipe.load_lora_weights(file, adapter_name="style")
    with pytest.raises(ValueError, match=r"the prior has the adapters \['style'\]: unload_lora_weights\(\) first"):
        pipe.quantize(dynamic=True)
    pipe.fuse_lora()
    fused = weights_of(pipe.prior)
    pipe.unload_lora_weights()
    pipe.quantize(dynamic=True)
    layer = pipe.prior.transformer_blocks[0].attn1.to_q
    back = dequantize_weight(np.asarray(layer.weight[...]), np.asarray(layer.weight_scale[...]), 0)
    wanted = fused["transformer_blocks.0.attn1.to_q.weight"]
    assert np.abs(back - wanted).max() <= 0.51 * np.asarray(layer.weight_scale[...]).max()


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_are_almost_the_same(shapes_pipe, quantized):
    # With generator=0 the second one is on an edge between two shapes, and the last bits decide.
    ours, full = (pipe(PROMPTS[:2], generator=1, **CALL).images for pipe in (quantized, shapes_pipe))
    assert note(np.abs(ours - full).mean() * 255, "mean |d| of 255") < 4
    assert not np.array_equal(ours, full)


def test_the_first_pipeline_keeps_its_networks(shapes_pipe, quantized):
    assert quantized.unet is not shapes_pipe.unet
    assert {leaf.dtype for leaf in flat_params(shapes_pipe.unet).values()} == {jnp.dtype("float32")}


def test_weights_take_a_quarter_of_float32(shapes_pipe, quantized):
    for name in ("unet", "prior_prior"):
        before, after = (getattr(pipe, name).get_memory_footprint() for pipe in (shapes_pipe, quantized))
        assert note(after / before, f"{name}, bytes beside float32") < 0.36


def test_a_saved_model_is_loaded_as_it_was(quantized, folder):
    loaded = KandinskyV22CombinedPipeline.from_pretrained(folder, dtype="float32")
    loaded.set_progress_bar_config(disable=True)
    for name in ("unet", "movq", "prior_prior"):
        assert same_weights(getattr(quantized, name), getattr(loaded, name))
    arguments = {"generator": 0, **CALL}
    assert np.array_equal(quantized(PROMPTS[:2], **arguments).images, loaded(PROMPTS[:2], **arguments).images)
    assert {report.status for report in verify(folder)} == {"ok"}


def test_a_dtype_is_of_what_is_not_quantized(folder):
    unet = load_network(UNet2DConditionModel, folder / "unet", "bfloat16")
    assert unet.dtype == jnp.bfloat16
    dtypes = {name.rpartition(".")[2]: str(leaf.dtype) for name, leaf in flat_params(unet).items() if "conv1" in name}
    assert dtypes == {
        "bias": "bfloat16",
        "kernel": "int8",
        "weight_scale": "float32",
        "weight_sum": "int32",
        "input_scale": "float32",
        "input_zero_point": "int8",
    }
    unet.to("float32")
    assert unet.down_blocks[0].resnets[0].conv1.bias.dtype == jnp.float32
    unet.to("float16")
    assert unet.down_blocks[0].resnets[0].conv1.kernel.dtype == jnp.int8
    assert unet.down_blocks[0].resnets[0].conv1.weight_scale.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
def test_either_layout_keeps_every_bit(shapes_pipe, tmp_path, layout, dtype):
    made = quantize_network(shapes_pipe.prior_prior, None, dtype)
    save_network(made, tmp_path, layout)
    assert same_weights(made, load_network(PriorTransformer, tmp_path, "float32"))
    assert same_weights(made, load_network(PriorTransformer, tmp_path))


def test_names_in_the_file_are_those_of_compressed_tensors(prior_folder):
    [file] = prior_folder.glob("*.safetensors")
    tensors = load_file(file)
    stem = "transformer_blocks.0.attn1.to_q"
    shapes = {name: (str(x.dtype), x.shape) for name, x in tensors.items() if name.startswith(f"{stem}.")}
    width = tensors[f"{stem}.bias"].shape[0]
    assert shapes == {
        f"{stem}.weight": ("int8", (width, width)),
        f"{stem}.weight_scale": ("float32", (width, 1)),
        f"{stem}.weight_sum": ("int32", (width,)),
        f"{stem}.input_scale": ("float32", (1,)),
        f"{stem}.input_zero_point": ("int8", (1,)),
        f"{stem}.bias": ("float32", (width,)),
    }


def test_a_fingerprint_is_of_the_quantized_values(prior_folder, tmp_path):
    config = load_network(PriorTransformer, prior_folder).config
    first = weights_fingerprint(PriorTransformer, config, prior_folder)
    rewrite(prior_folder, tmp_path, lambda tensors: tensors[f"{LAYER}.weight_scale"].__imul__(2))
    assert first != weights_fingerprint(PriorTransformer, config, tmp_path)


# Damaged checkpoints ----------------------------------------------------------------------------------------------

LAYER = "transformer_blocks.1.ff.net.2"


def rewrite(source: Path, target: Path, change) -> None:
    """Copy a network with changed tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    [file] = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def without(name: str):
    return lambda tensors: tensors.pop(f"{LAYER}.{name}")


def filled(name: str, value: float):
    return lambda tensors: tensors[f"{LAYER}.{name}"].fill(value)


def cast(name: str, dtype: str):
    def change(tensors: dict) -> None:
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("weight_scale"), rf"missing: {LAYER}\.weight_scale \["),
        (without("input_scale"), rf"missing: {LAYER}\.input_scale \[1\]"),
        (cast("weight", "float32"), rf"dtype: {LAYER}\.weight is float32, weights are int8"),
        (cast("weight", "uint8"), rf"dtype: {LAYER}\.weight is U8, weights are int8"),
        (cast("weight_scale", "int8"), rf"dtype: {LAYER}\.weight_scale is int8, weights are float64, float32"),
        (cast("bias", "int8"), rf"dtype: {LAYER}\.bias is int8, weights are float64"),
        (filled("weight_scale", np.nan), rf"not finite as float32: {LAYER}\.weight_scale in"),
        (filled("weight_scale", np.inf), rf"not finite as float32: {LAYER}\.weight_scale in"),
        (filled("input_scale", 0), rf"not a positive scale: {LAYER}\.input_scale in 1 of 1"),
        (filled("weight_scale", -1), rf"not a positive scale: {LAYER}\.weight_scale in"),
        (filled("input_scale", 1e-40), rf"not a positive scale: {LAYER}\.input_scale in 1 of 1"),
    ],
    ids=range(11),
)
def test_damage_is_told_in_a_sentence(prior_folder, tmp_path, change, says):
    rewrite(prior_folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"is not what its config\.json describes, .*{says}"):
        load_network(PriorTransformer, tmp_path, "float32")


def test_a_scale_in_another_dtype_is_read_as_float32(prior_folder, tmp_path):
    rewrite(prior_folder, tmp_path, cast("weight_scale", "float16"))
    layer = load_network(PriorTransformer, tmp_path, "bfloat16").transformer_blocks[1].ff.net[2]
    assert layer.weight_scale.dtype == jnp.float32


def test_full_weights_under_a_quantized_configuration_are_refused(prior_folder, tmp_path):
    shutil.copytree(SHAPES_MODEL / hub.PRIOR / "prior", tmp_path, dirs_exist_ok=True)
    shutil.copy(prior_folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: .*; dtype: .* is float16, weights are int8"):
        load_network(PriorTransformer, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported, only 'compressed-tensors'"),
        ({"ignore": ["conv_in"]}, r"config\.json quantization_config\.ignore names no layers of the network: conv_in"),
    ],
    ids=["method", "layers"],
)
def test_another_method_is_refused(prior_folder, tmp_path, change, says):
    shutil.copytree(prior_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says):
        load_network(PriorTransformer, tmp_path)


# LoRA, batch jobs, conversion -------------------------------------------------------------------------------------


def test_lora_changes_a_quantized_network_and_leaves_it_as_it_was(shapes_pipe, quantized, tmp_path):
    changes = random_changes(shapes_pipe.unet, 3)
    file = lora_files.write(tmp_path, {"unet": changes}, "lora.safetensors")
    pipe, before = again(quantized), weights_of(quantized.unet)
    pipe.load_lora_weights(file)
    changed = weights_of(pipe.unet)
    layer = next(name for name in changes if f"{name}.weight_scale" in changed)
    weight, scale = (changed[f"{layer}.{name}"] for name in ("weight", "weight_scale"))
    assert weight.dtype == np.int8
    wanted = np.asarray(flat_params(shapes_pipe.unet)[f"{layer}.weight"]) + changes[layer].delta()
    assert np.abs(weight * scale - wanted).max() <= 1.1 * scale.max() + before[f"{layer}.weight_scale"].max()
    pipe.unload_lora_weights()
    after = weights_of(pipe.unet)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_batch_job_generates_what_a_call_does(folder, tmp_path):
    rows = [{"prompt": PROMPTS[0], "seed": 3}]
    job = job_of(tmp_path, rows, model=str(folder), defaults={"steps": 4, "prior_steps": 3})
    assert run_job(job, load_pipeline(job)).complete
    [data] = [data for name, data in members(tmp_path / "out").items() if name.endswith(".png")]
    pipe = KandinskyV22CombinedPipeline.from_pretrained(folder, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 4, "prior_num_inference_steps": 3}
    image = pipe(PROMPTS[0], height=64, width=64, generator=3, **steps).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


@pytest.mark.parametrize(
    ("cls", "repository"),
    slow_and_campaign(
        [(KandinskyV22InpaintCombinedPipeline, hub.INPAINT), (KandinskyV22ControlnetCombinedPipeline, hub.CONTROLNET)],
        (KandinskyV22InpaintCombinedPipeline, hub.INPAINT),
    ),
)
def test_other_unets_are_calibrated_too(cls, repository, tmp_path):
    full = cls.from_pretrained(SHAPES_MODEL, dtype="float32")
    full.set_progress_bar_config(disable=True)
    pipe = again(full)
    pipe.quantize(prompts=PROMPTS[:2])
    arguments: dict[str, object] = {"hint": Image.new("L", (64, 64), 90)}
    if repository == hub.INPAINT:
        mask = np.arange(64)[:, None] + np.zeros(64) > 30
        arguments = {"image": Image.new("RGB", (64, 64), "red"), "mask_image": mask}
    ours, theirs = (p(PROMPTS[0], generator=0, **CALL, **arguments).images for p in (pipe, full))
    assert note(np.abs(ours - theirs).mean() * 255, f"{repository}, mean |d| of 255") < 8
    pipe.save_pretrained(tmp_path / "model")
    loaded = cls.from_pretrained(tmp_path / "model", dtype="float32")
    assert same_weights(loaded.unet, pipe.unet)


@pytest.mark.slow
def test_a_model_is_converted_and_runs(quantized, tmp_path):
    family = tmp_path / "family"
    for name in (hub.PRIOR, hub.DECODER):
        convert_quantized(SHAPES_MODEL / name, family / name, prompts=PROMPTS[:2], progress=False)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(family, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "movq", "prior_prior"):
        ours, theirs = flat_params(getattr(pipe, name)), flat_params(getattr(quantized, name))
        weights = [key for key, leaf in theirs.items() if leaf.dtype == jnp.int8]
        assert weights
        assert all(np.array_equal(ours[key], theirs[key]) for key in weights)
    assert pipe(PROMPTS[:2], generator=0, **CALL).images.shape == (2, 64, 64, 3)
    assert {report.status for report in verify(family / hub.DECODER)} == {"ok"}
    # The prior beside a decoder may be quantized already; what is to be converted may not.
    shutil.copytree(SHAPES_MODEL / hub.DECODER, family / "full")
    convert_quantized(family / "full", family / "again", prompts=PROMPTS[:1], progress=False)
    with pytest.raises(CheckpointError, match=r"config\.json describes quantized weights; convert the full ones"):
        convert_quantized(family / hub.DECODER, tmp_path / "twice", progress=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quantize", "int4"], "--quantize=int4 is not supported, only int8, float8_e4m3fn"),
        (["--dynamic"], "--component need --quantize int8 too"),
        (["--prior", "x"], "--component need --quantize int8 too"),
        (["--component", "unet"], "--component need --quantize int8 too"),
        (["--quantize", "int8", "--component", "image_encoder"], "['image_encoder'] cannot be quantized in"),
        (["--quantize", "int8", "--dynamic", "--prior", "x"], "--dynamic needs no calibration"),
        (["--quantize", "int8", "--prompts", "nothing.txt"], "nothing.txt"),
    ],
    ids=range(7),
)
def test_options_that_do_not_go_together(arguments, says, tmp_path):
    result = CliRunner().invoke(app, [str(SHAPES_MODEL / hub.DECODER), str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, ValueError)
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "out exists already"),
        ({"layout": "flax"}, "layout must be .* or None, got 'flax'"),
        ({"dtype": "int4"}, "'int4' is not supported"),
        ({"components": []}, "components is empty: give one or more, or leave it out"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a"], "dynamic": True}, "needs no calibration: leave prompts and prior out"),
        ({"weights_dtype": "int3"}, "int3"),
    ],
    ids=range(7),
)
def test_nothing_is_calibrated_before_all_else_is_checked(options, says, tmp_path, monkeypatch):
    def calibrated(*_):
        raise AssertionError("calibrated")

    monkeypatch.setattr("kandinsky_jax.pipelines.quantization.calibrate", calibrated)
    if not options:
        (tmp_path / "out").mkdir()
    with pytest.raises((ValueError, OSError, TypeError), match=says):
        convert_quantized(SHAPES_MODEL / hub.DECODER, tmp_path / "out", progress=False, **options)


def test_one_name_and_one_prompt_stand_for_themselves(shapes_pipe):
    pipe = again(shapes_pipe)
    with pytest.raises(ValueError, match="dynamic=True or --dynamic needs no calibration: leave prompts and prior out"):
        pipe.quantize(prompts=PROMPTS, dynamic=True)
    with pytest.raises(ValueError, match="components is empty"):
        pipe.quantize(components=[])
    pipe.quantize(components="prior", dynamic=True)
    assert pipe.prior_prior.config.quantization_config is not None
    assert pipe.unet.config.quantization_config is None
    assert as_list("prompts", "red cat") == ["red cat"]


def test_prompts_are_read_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a green star \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a green star"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt has no prompts; needed is one a line"):
        read_prompts(tmp_path / "empty.txt")


def test_training_refuses_quantized_weights(folder, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "0.txt").write_text("a red picture")
    config = Config(model=str(folder), data=str(tmp_path / "data"), output=str(tmp_path / "out"), resolution=64)
    with pytest.raises(ValueError, match=r"the \['unet'\] of .* is quantized: train the full weights instead"):
        Run(Kind.DECODER, config)


def test_a_decoder_without_a_prior_is_converted_with_scales_at_run_time(tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(SHAPES_MODEL / hub.DECODER, alone)
    with pytest.raises(CheckpointError, match=r"name one \(--prior FOLDER_OR_REPOSITORY\), .* \(--dynamic\)"):
        convert_quantized(alone, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    convert_quantized(alone, tmp_path / "out", dynamic=True, weights_dtype="bfloat16", progress=False)
    unet = load_network(UNet2DConditionModel, tmp_path / "out" / "unet")
    assert unet.config.quantization_config.dynamic
    assert not any(name.endswith("input_scale") for name in flat_params(unet))
    assert unet.dtype == jnp.bfloat16


def test_one_network_is_quantized_and_the_others_stay_as_they_were(tmp_path):
    source, target = SHAPES_MODEL / hub.DECODER, tmp_path / "out"
    result = CliRunner().invoke(
        app, [str(source), str(target), "--quantize", "int8", "--dynamic", "--component", "unet"]
    )
    assert result.exception is None, result.output
    assert load_network(UNet2DConditionModel, target / "unet").config.quantization_config is not None
    assert "quantization_config" not in json.loads((target / "movq" / "config.json").read_text())
    assert same_weights(load_network(VQModel, target / "movq"), load_network(VQModel, source / "movq"))
