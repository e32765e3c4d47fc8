"""A model's own fast adapter: loading it is loading its LoRA by hand, with its scheduler and its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kandinsky_jax import (
    CheckpointError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    scheduler_named,
)
from kandinsky_jax.checkpoint import fast_adapters, flat_params, hub, load_network, lora_files
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.manifest import FAULTS, verify
from kandinsky_jax.checkpoint.recommended_settings import FILE
from kandinsky_jax.models import UNet2DConditionModel
from tests import fast_model
from tests.checkpoint.test_hub import cached
from tests.conftest import SHAPES_MODEL
from tests.fast_model import ARGUMENTS, DECODER, LORA, PRIOR, write_table
from tests.pipelines.test_adapters import random_changes
from tests.pipelines.test_compile import compilations

PROMPT = "a red circle on a blue background"
SIZE = {"height": 64, "width": 64, "output_type": "np", "generator": 0}


@pytest.fixture(scope="module")
def family(shapes_pipe, tmp_path_factory) -> Path:
    return fast_model.write(tmp_path_factory.mktemp("family") / "shapes", shapes_pipe)


def load(cls, where: Path, **arguments):
    pipe = cls.from_pretrained(where, dtype="float32", **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(family):
    return load(KandinskyV22CombinedPipeline, family)


@pytest.fixture(scope="module")
def by_hand(family):
    """A pipeline with the same LoRA and scheduler."""
    pipe = load(KandinskyV22CombinedPipeline, SHAPES_MODEL)
    fast_model.load_by_hand(pipe, family)
    return pipe


@pytest.fixture(scope="module")
def expected(by_hand) -> np.ndarray:
    return by_hand(PROMPT, **SIZE, **ARGUMENTS).images


def weights_of(pipe) -> dict[str, np.ndarray]:
    networks = {"unet": pipe.unet, "prior": pipe.prior_prior}
    return {f"{part}.{name}": np.asarray(x) for part, net in networks.items() for name, x in flat_params(net).items()}


def assert_same(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not np.array_equal(some[name], others[name])] == []


def test_a_prompt_alone_gives_the_picture_of_the_lora_loaded_by_hand(pipe, expected):
    assert pipe.load_fast() == ARGUMENTS
    assert np.array_equal(pipe(PROMPT, **SIZE).images, expected)
    assert (pipe.num_timesteps, pipe.prior_num_timesteps) == (3, 2)
    assert not pipe.do_classifier_free_guidance
    assert np.array_equal(pipe.generate(PROMPT, **SIZE).result().images, expected)
    assert pipe.load_fast() == ARGUMENTS  # again
    assert np.array_equal(pipe(PROMPT, **SIZE).images, expected)


def test_stages_by_themselves_are_fast_too(pipe, expected):
    pipe.load_fast()
    embeds = pipe.prior_pipe(PROMPT, generator=0)
    assert pipe.prior_pipe.num_timesteps == 2
    assert not pipe.prior_pipe.do_classifier_free_guidance
    images = pipe.decoder_pipe(embeds.image_embeds, embeds.negative_image_embeds, **SIZE).images
    assert np.array_equal(images, expected)
    pipe.prior_pipe.interpolate([PROMPT], [1.0], generator=0)
    assert pipe.prior_pipe.num_timesteps == 2


def test_what_is_given_wins(pipe, by_hand):
    pipe.load_fast()
    given = {"num_inference_steps": 2, "prior_num_inference_steps": 3, "guidance_scale": 2.0}
    images = pipe(PROMPT, **SIZE, **given).images
    assert np.array_equal(images, by_hand(PROMPT, **SIZE, **ARGUMENTS | given).images)
    pipe(PROMPT, None, 2, 1.0, **SIZE)  # by position
    assert (pipe.num_timesteps, pipe.prior_num_timesteps) == (2, 2)
    pipe.prior_pipe.interpolate([PROMPT], [1.0], 1, 3, 0)
    assert pipe.prior_pipe.num_timesteps == 3


def test_unloading_undoes_it(pipe):
    before, scheduler = weights_of(pipe), pipe.scheduler
    pipe.unload_fast()  # nothing to do
    pipe.load_fast()
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert pipe.get_list_adapters() == {"unet": ["fast"], "prior_prior": ["fast"]}
    pipe.unload_fast()
    assert_same(weights_of(pipe), before)
    assert pipe.scheduler is scheduler
    assert pipe.get_list_adapters() == {}
    assert pipe._call_defaults() == {}
    pipe.load_fast()
    pipe.scheduler = chosen = scheduler_named("tcd", scheduler.config)
    pipe.load_fast()
    pipe.unload_fast()
    assert pipe.scheduler is chosen


def test_it_joins_a_style_that_is_active(pipe, by_hand, tmp_path):
    lora_files.write(tmp_path, {"unet": random_changes(pipe.unet, 3)})
    for each in (pipe, by_hand):
        each.load_lora_weights(tmp_path, "style")
    by_hand.set_adapters(["style", hub.DECODER, hub.PRIOR], [0.5, 1.0, 1.0])
    pipe.set_adapters("style", 0.5)
    assert pipe.load_fast() == ARGUMENTS
    assert set(pipe.get_active_adapters()) == {"style", "fast"}
    assert_same(weights_of(pipe), weights_of(by_hand))
    pipe.set_adapters("style")
    assert pipe.decoder_pipe._call_defaults() == {}  # as the weights are not the fast ones now
    pipe.set_adapters(["style", "fast"], [0.5, 1.0])
    assert_same(weights_of(pipe), weights_of(by_hand))
    pipe.unload_fast()
    assert pipe.get_active_adapters() == ["style"]
    by_hand.delete_adapters("style")
    by_hand.set_adapters([hub.DECODER, hub.PRIOR])


def test_what_cannot_be_joined_is_refused_and_nothing_changes(pipe, tmp_path):
    lora_files.write(tmp_path, {"unet": random_changes(pipe.unet, 3)})
    pipe.load_lora_weights(tmp_path, "fast")
    before = weights_of(pipe)
    with pytest.raises(ValueError, match="there is an adapter 'fast' already"):
        pipe.load_fast()
    pipe.unload_fast()  # not ours
    assert pipe.get_active_adapters() == ["fast"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, "style")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"the adapters \['style'\] are fused"):
        pipe.load_fast()
    assert_same(weights_of(pipe), before)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"


def test_pipelines_of_the_same_networks(pipe, family, expected):
    decoder = load(KandinskyV22Pipeline, family)
    prior = load(KandinskyV22PriorPipeline, family / hub.PRIOR)
    combined = KandinskyV22CombinedPipeline.from_pipe(prior, decoder)
    assert combined.load_fast() == ARGUMENTS
    assert np.array_equal(combined(PROMPT, **SIZE).images, expected)
    assert decoder._call_defaults() == prior._call_defaults() == {}  # they did not ask for it
    assert decoder.load_fast() == {"num_inference_steps": 3, "guidance_scale": 1.0}
    assert type(decoder.scheduler).__name__ == "LCMScheduler"
    assert prior.load_fast() == {"num_inference_steps": 2, "guidance_scale": 1.0}
    later = KandinskyV22Img2ImgCombinedPipeline.from_pipe(combined)
    assert later._call_defaults() == ARGUMENTS
    assert KandinskyV22PriorEmb2EmbPipeline.from_pipe(combined)._call_defaults() == prior.load_fast()
    assert KandinskyV22Pipeline.from_pipe(combined, unet=pipe.unet)._call_defaults() == {}  # another network
    later.unload_fast()
    assert combined._call_defaults() == {}


def test_nothing_compiles_after_a_warmup(pipe):
    pipe.load_fast()
    pipe.warmup(height=64, width=128)
    with compilations() as events:
        pipe(PROMPT, **SIZE | {"width": 128})
    assert not events


def test_a_prior_without_one_runs_as_usual(family, tmp_path):
    model = Path(shutil.copytree(family, tmp_path / "model"))
    (model / hub.PRIOR / FILE).unlink()
    pipe = load(KandinskyV22CombinedPipeline, model)
    assert pipe.load_fast() == {"num_inference_steps": 3, "guidance_scale": 1.0}
    assert pipe.get_list_adapters() == {"unet": ["fast"]}
    write_table(model / hub.DECODER, DECODER | {"prior_num_inference_steps": 4})
    pipe = load(KandinskyV22CombinedPipeline, model)
    assert pipe.load_fast()["prior_num_inference_steps"] == 4
    with pytest.raises(CheckpointError, match="has no fast adapter"):
        pipe.prior_pipe.load_fast()


def test_each_decoder_has_an_adapter_of_its_own(family, tmp_path):
    model = Path(shutil.copytree(family, tmp_path / "model"))
    inpaint = load(KandinskyV22InpaintCombinedPipeline, model)
    lora_files.write(model / hub.INPAINT, {"unet": random_changes(inpaint.unet, 4)}, "other.safetensors")
    write_table(model / hub.INPAINT, {"lora": "other.safetensors", "num_inference_steps": 6})
    inpaint = load(KandinskyV22InpaintCombinedPipeline, model)
    before = weights_of(inpaint)
    arguments = {name: value for name, value in ARGUMENTS.items() if name.startswith("prior_")}
    assert inpaint.load_fast() == arguments | {"num_inference_steps": 6}
    assert type(inpaint.scheduler).__name__ == "DDPMScheduler"  # the table names none
    changed = {name for name, array in weights_of(inpaint).items() if not np.array_equal(array, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"unet", "prior"}


def test_without_one_the_error_says_what_is_needed(shapes_pipe, family):
    inpaint = load(KandinskyV22InpaintCombinedPipeline, SHAPES_MODEL)
    with pytest.raises(
        CheckpointError, match=f"{hub.INPAINT} and .*{hub.PRIOR} have no fast adapter: needed is .*{FILE}"
    ):
        inpaint.load_fast()
    with pytest.raises(CheckpointError, match="has no fast adapter"):
        load(KandinskyV22Pipeline, SHAPES_MODEL).load_fast()
    unet = load_network(UNet2DConditionModel, family / hub.DECODER / "unet")
    with pytest.raises(CheckpointError, match=r"not read from a model's folder, .*: load it with from_pretrained"):
        KandinskyV22Pipeline(**shapes_pipe.decoder_pipe.components | {"unet": unet}).load_fast()


def test_a_file_that_cannot_be_used_is_reported_and_changes_nothing(family, tmp_path):
    model = Path(shutil.copytree(family, tmp_path / "model"))
    pipe = load(KandinskyV22CombinedPipeline, model)
    before = weights_of(pipe)
    (model / hub.DECODER / LORA).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=LORA):
        pipe.load_fast()
    shutil.copy(family / hub.PRIOR / LORA, model / hub.DECODER / LORA)
    with pytest.raises(CheckpointError, match="is for a prior, and this pipeline has none"):
        pipe.load_fast()
    (model / hub.DECODER / LORA).unlink()
    with pytest.raises(CheckpointError, match=f"{LORA} is not there, which {FILE} names as a fast adapter: put it"):
        pipe.load_fast()
    assert_same(weights_of(pipe), before)
    assert pipe._call_defaults() == {}
    (model / hub.DECODER / FILE).write_text("{")
    with pytest.raises(CheckpointError, match=FILE):
        load(KandinskyV22Pipeline, model / hub.DECODER).load_fast()


def test_offline_without_the_file_the_error_says_how_to_fetch_it(family, tmp_path):
    snapshot = cached(tmp_path, "someone/decoder", family / hub.DECODER)
    here = {"cache_dir": tmp_path, "local_files_only": True}
    assert load(KandinskyV22Pipeline, "someone/decoder", **here).load_fast()
    (snapshot / LORA).unlink()
    pipe = load(KandinskyV22Pipeline, "someone/decoder", **here)
    with pytest.raises(CheckpointError, match=r"load the model without local_files_only or HF_HUB_OFFLINE once"):
        pipe.load_fast()
    assert [r.path for r in verify(snapshot) if r.status in FAULTS] == [LORA]


# Saving -----------------------------------------------------------------------------------------------------------


def test_saved_models_keep_their_adapter(pipe, family, expected, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    pipe.decoder_pipe.save_pretrained(tmp_path / hub.DECODER)
    KandinskyV22PriorPipeline.from_pipe(pipe).save_pretrained(tmp_path / hub.PRIOR)
    convert(family / hub.PRIOR, tmp_path / "converted", progress=False)
    assert json.loads((tmp_path / "whole" / FILE).read_text())["fast"] == {
        **{"prior_lora": f"prior_{LORA}"},
        **DECODER,
        **{name: value for name, value in PRIOR.items() if name != "lora"},
    }
    for folder in ("whole", hub.DECODER):
        saved = load(KandinskyV22CombinedPipeline, tmp_path / folder)
        assert saved.load_fast() == ARGUMENTS
        assert np.array_equal(saved(PROMPT, **SIZE).images, expected)
    for folder in ("whole", hub.DECODER, hub.PRIOR, "converted"):
        assert {report.status for report in verify(tmp_path / folder)} == {"ok"}
    assert json.loads((tmp_path / hub.PRIOR / FILE).read_text()) == json.loads((family / hub.PRIOR / FILE).read_text())
    assert load(KandinskyV22PriorPipeline, tmp_path / "converted").load_fast()
    load(KandinskyV22Pipeline, SHAPES_MODEL).save_pretrained(tmp_path / hub.DECODER)
    assert not (tmp_path / hub.DECODER / LORA).exists()  # that of the model before


def test_a_model_that_is_saved_fast_is_a_fast_model(pipe, expected, tmp_path):
    """As with any LoRA: the weights as they are, and with them the scheduler and the settings."""
    pipe.load_fast()
    pipe.save_pretrained(tmp_path / "saved")
    saved = load(KandinskyV22CombinedPipeline, tmp_path / "saved")
    assert saved.recommended_settings.arguments() == ARGUMENTS
    assert saved.recommended_settings.scheduler == "lcm"
    images = saved(PROMPT, **SIZE, **saved.recommended_settings.arguments()).images
    assert np.array_equal(images, expected)
    with pytest.raises(CheckpointError, match="has no fast adapter"):
        saved.load_fast()


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["never", "before", "after"])
def test_a_model_whose_adapter_is_fused_and_unloaded_stays_fast(pipe, expected, disabled, tmp_path):
    pipe.load_fast()
    if disabled == "before":
        pipe.disable_lora()
    pipe.fuse_lora()
    if disabled == "after":
        pipe.disable_lora()
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    assert np.array_equal(pipe(PROMPT, **SIZE).images, expected)
    before = weights_of(pipe)
    assert pipe.load_fast() == ARGUMENTS  # nothing is applied twice
    assert_same(before, weights_of(pipe))
    with pytest.raises(ValueError, match="the weights keep it: load the model again"):
        pipe.unload_fast()
    pipe.save_pretrained(tmp_path / "saved")
    saved = load(KandinskyV22CombinedPipeline, tmp_path / "saved")
    assert saved.recommended_settings.arguments() == ARGUMENTS
    assert saved.recommended_settings.fast is None
    assert_same(before, weights_of(saved))


def test_a_model_that_is_saved_while_the_adapter_is_off_is_the_usual_one(pipe, tmp_path):
    pipe.load_fast()
    pipe.disable_lora()
    pipe.save_pretrained(tmp_path / "saved")
    saved = load(KandinskyV22CombinedPipeline, tmp_path / "saved")
    assert type(saved.scheduler).__name__ == "DDPMScheduler"
    assert saved.recommended_settings.scheduler is None
    assert saved.load_fast() == ARGUMENTS


def test_nothing_is_unloaded_where_a_part_is_fused(pipe):
    pipe.load_fast()
    pipe.fuse_lora(components=["prior_prior"])
    with pytest.raises(ValueError, match="the adapter 'fast' is fused; call unfuse_lora first"):
        pipe.unload_fast()
    assert pipe._call_defaults() == ARGUMENTS


def test_weights_that_have_another_adapter_fused_are_not_fast(pipe, tmp_path):
    """Since fused adapters stand in the place of active ones."""
    lora_files.write(tmp_path, {"unet": random_changes(pipe.unet, 3)}, LORA)
    pipe.load_lora_weights(tmp_path, "style", weight_name=LORA)
    pipe.load_fast()
    pipe.fuse_lora(components=["unet"], adapter_names=["style"])
    assert "num_inference_steps" not in pipe._call_defaults()


@pytest.mark.parametrize("of_adapter", [None, {}, {"prior_num_inference_steps": 6, "prior_guidance_scale": 1.5}])
def test_what_a_prior_says_of_itself_comes_before_the_decoders_adapter(family, of_adapter, tmp_path):
    """In pipelines, commands and saved models; first what it says of an adapter of its own."""
    model = Path(shutil.copytree(family, tmp_path / "model"))
    write_table(model / hub.DECODER, DECODER | {"prior_num_inference_steps": 4, "prior_guidance_scale": 2.0})
    own = {"prior_num_inference_steps": 7, "prior_guidance_scale": 3.0}
    fast = {} if of_adapter is None else {"fast": {"lora": LORA, **of_adapter}}
    (model / hub.PRIOR / FILE).write_text(json.dumps({"format_version": 2, **own, **fast}))
    expected = {"num_inference_steps": 3, "guidance_scale": 1.0, **own, **(of_adapter or {})}
    pipe = load(KandinskyV22CombinedPipeline, model / hub.DECODER)
    assert pipe.load_fast() == expected
    folders = [model / hub.DECODER, model / hub.PRIOR]
    assert fast_adapters.settings_of_model(folders, fast=True).arguments() == expected
    pipe.save_pretrained(tmp_path / "fast")
    assert load(KandinskyV22CombinedPipeline, tmp_path / "fast").recommended_settings.arguments() == expected
    pipe.unload_fast()
    pipe.save_pretrained(tmp_path / "usual")
    usual = load(KandinskyV22CombinedPipeline, tmp_path / "usual")
    assert usual.recommended_settings.prior_arguments() == own
    assert usual.load_fast() == expected


def test_saving_without_the_file_warns(family, tmp_path):
    model = Path(shutil.copytree(family, tmp_path / "model"))
    decoder = load(KandinskyV22Pipeline, model)
    shutil.rmtree(model)
    with pytest.warns(UserWarning, match=f"saved without a fast adapter: .*{LORA} is not there"):
        decoder.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / FILE).read_text()) == {"format_version": 1, "guidance_scale": 2.0}


def test_an_adapter_that_the_manifest_does_not_list_is_unexpected(pipe, tmp_path):
    pipe.decoder_pipe.save_pretrained(tmp_path / "saved")
    manifest = tmp_path / "saved" / "kandinsky_jax_manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"][LORA]
    manifest.write_text(json.dumps(content))
    assert [(r.path, r.status) for r in verify(tmp_path / "saved") if r.status != "ok"] == [(LORA, "unexpected")]
