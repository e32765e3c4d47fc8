"""One set of arrays for every mode: `from_pipe`, and the AutoPipelines."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import kandinsky_jax
from kandinsky_jax import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    CheckpointError,
    DDIMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.models import attend, with_attention
from tests.conftest import SHAPES_MODEL


def buffers(pipe) -> set[int]:
    """Where a pipeline's parameters lie in memory."""
    modules = [part for part in pipe.components.values() if isinstance(part, nnx.Module)]
    leaves = [leaf for module in modules for leaf in jax.tree.leaves(nnx.state(module))]
    return {leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size}


def test_no_parameter_is_copied(shapes_pipe, monkeypatch):
    """From text-to-image round all modes of its checkpoint and back, without one array or file more."""
    monkeypatch.setattr(kandinsky_jax.pipelines.loading, "load_network", lambda *_, **__: pytest.fail("loaded again"))
    before = {id(array) for array in jax.live_arrays()}
    text2img = KandinskyV22Pipeline.from_pipe(shapes_pipe)
    img2img = KandinskyV22Img2ImgPipeline.from_pipe(text2img)
    prior = KandinskyV22PriorPipeline.from_pipe(shapes_pipe)
    emb2emb = KandinskyV22PriorEmb2EmbPipeline.from_pipe(prior)
    combined = KandinskyV22Img2ImgCombinedPipeline.from_pipe(img2img, emb2emb)
    again = KandinskyV22CombinedPipeline.from_pipe(combined)
    assert {id(array) for array in jax.live_arrays()} == before
    assert buffers(again) == buffers(combined) == buffers(shapes_pipe) == buffers(img2img) | buffers(emb2emb)
    assert len(buffers(shapes_pipe)) > 500
    assert all(again.components[name] is part for name, part in shapes_pipe.components.items())
    # The schedulers of both stages are called alike, and stay apart.
    assert combined.scheduler is shapes_pipe.scheduler
    assert combined.prior_scheduler is shapes_pipe.prior_scheduler is prior.scheduler


def test_inpaint_and_controlnet_share_what_they_can(shapes_pipe, ours):
    inpaint = ours["KandinskyV22InpaintPipeline"]
    combined = KandinskyV22InpaintCombinedPipeline.from_pipe(inpaint, shapes_pipe.prior_pipe)
    assert combined.unet is inpaint.unet
    assert combined.movq is shapes_pipe.movq
    assert combined.prior_prior is shapes_pipe.prior_prior
    # A combined pipeline's prior with another decoder
    controlnet = ours["KandinskyV22ControlnetPipeline"]
    both = kandinsky_jax.KandinskyV22ControlnetCombinedPipeline.from_pipe(shapes_pipe, controlnet)
    assert both.unet is controlnet.unet
    assert both.prior_text_encoder is shapes_pipe.prior_text_encoder


def test_components_count_before_the_pipes(shapes_pipe):
    scheduler = DDIMScheduler.from_config(shapes_pipe.scheduler.config)
    pipe = KandinskyV22Img2ImgPipeline.from_pipe(shapes_pipe, scheduler=scheduler)
    assert pipe.scheduler is scheduler
    assert shapes_pipe.scheduler is not scheduler


def test_the_progress_bar_stays_as_it_was(shapes_pipe):
    assert KandinskyV22Img2ImgPipeline.from_pipe(shapes_pipe.decoder_pipe)._progress_bar_config == {"disable": True}
    assert KandinskyV22Pipeline.from_pipe(shapes_pipe)._progress_bar_config == {"disable": True}


def test_from_pipe_says_what_is_missing(shapes_pipe, ours):
    with pytest.raises(TypeError, match=r"needs prior_prior, .*which KandinskyV22Pipeline does not have.*other_pipe"):
        KandinskyV22CombinedPipeline.from_pipe(shapes_pipe.decoder_pipe)
    with pytest.raises(TypeError, match="needs unet, scheduler, movq, which KandinskyV22PriorPipeline does not have"):
        KandinskyV22Pipeline.from_pipe(shapes_pipe.prior_pipe)
    with pytest.raises(TypeError, match="has no component"):
        KandinskyV22Pipeline.from_pipe(shapes_pipe, unett=3)
    with pytest.raises(CheckpointError, match="it is one for KandinskyV22InpaintPipeline"):
        KandinskyV22Pipeline.from_pipe(ours["KandinskyV22InpaintPipeline"])
    with pytest.raises(CheckpointError, match="it is one for KandinskyV22Pipeline"):
        KandinskyV22InpaintPipeline.from_pipe(shapes_pipe)
    with pytest.raises(CheckpointError, match="it is one for KandinskyV22Pipeline"):
        KandinskyV22ControlnetPipeline.from_pipe(shapes_pipe)


@pytest.mark.parametrize(
    ("auto", "member", "expected"),
    [
        (AutoPipelineForText2Image, "", "KandinskyV22CombinedPipeline"),
        (AutoPipelineForText2Image, hub.CONTROLNET, "KandinskyV22ControlnetCombinedPipeline"),
        (AutoPipelineForImage2Image, "", "KandinskyV22Img2ImgCombinedPipeline"),
        (
            AutoPipelineForImage2Image,
            hub.CONTROLNET,
            "KandinskyV22ControlnetImg2ImgCombinedPipeline",
        ),
        (AutoPipelineForInpainting, "", "KandinskyV22InpaintCombinedPipeline"),
        (AutoPipelineForInpainting, hub.INPAINT, "KandinskyV22InpaintCombinedPipeline"),
    ],
)
def test_auto_from_pretrained(shapes_pipe, auto, member, expected):
    shared = {k: v for k, v in shapes_pipe.components.items() if k.startswith("prior_") or k == "movq"}
    assert type(auto.from_pretrained(SHAPES_MODEL / member, dtype="float32", **shared)).__name__ == expected


def test_auto_from_pipe(shapes_pipe, ours):
    img2img = AutoPipelineForImage2Image.from_pipe(shapes_pipe)
    assert type(img2img) is KandinskyV22Img2ImgCombinedPipeline
    assert img2img.unet is shapes_pipe.unet
    assert type(AutoPipelineForText2Image.from_pipe(img2img)) is KandinskyV22CombinedPipeline
    assert type(AutoPipelineForImage2Image.from_pipe(shapes_pipe.decoder_pipe)) is KandinskyV22Img2ImgPipeline
    inpaint = ours["KandinskyV22InpaintPipeline"]
    assert type(AutoPipelineForInpainting.from_pipe(inpaint)) is KandinskyV22InpaintPipeline
    both = AutoPipelineForInpainting.from_pipe(inpaint, shapes_pipe.prior_pipe)
    assert type(both) is KandinskyV22InpaintCombinedPipeline


def test_auto_names_the_right_class(shapes_pipe, ours):
    with pytest.raises(CheckpointError, match="KandinskyV22InpaintPipeline; use AutoPipelineForInpainting"):
        AutoPipelineForText2Image.from_pretrained(SHAPES_MODEL / hub.INPAINT)
    with pytest.raises(
        CheckpointError, match="KandinskyV22Pipeline; use AutoPipelineForText2Image or AutoPipelineForImage2Image"
    ):
        AutoPipelineForInpainting.from_pretrained(SHAPES_MODEL / hub.DECODER)
    with pytest.raises(CheckpointError, match="use AutoPipelineForInpainting"):
        AutoPipelineForImage2Image.from_pipe(ours["KandinskyV22InpaintPipeline"])
    with pytest.raises(CheckpointError, match="KandinskyV22PriorPipeline; needed is a kandinsky-2-2-decoder"):
        AutoPipelineForText2Image.from_pretrained(SHAPES_MODEL / hub.PRIOR)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoPipelineForText2Image()


def test_a_saved_combined_pipeline_serves_every_mode(shapes_pipe, tmp_path):
    """Its folder holds a decoder and a prior, and is read by all classes of its kind, whichever wrote it."""
    AutoPipelineForImage2Image.from_pipe(shapes_pipe).save_pretrained(tmp_path / "saved")
    prior = {k: v for k, v in shapes_pipe.components.items() if k.startswith("prior_")}
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path / "saved", **prior)) is KandinskyV22CombinedPipeline
    assert type(KandinskyV22Pipeline.from_pretrained(tmp_path / "saved")) is KandinskyV22Pipeline


@pytest.mark.slow
def test_a_network_with_another_attention_has_constants_of_its_own(shapes_pipe):
    """The prior keeps the condition of the empty prompt and the embedding of zeros by module, not by arrays alone."""
    prior = KandinskyV22PriorPipeline.from_pipe(shapes_pipe.prior_pipe)
    before = prior("a red circle", num_inference_steps=3, generator=0).image_embeds

    def softer(query, key, value, mask, *, name):
        return attend(0.5 * query, key, value, mask)

    plain, prior.prior = prior.prior, with_attention(prior.prior, softer)
    other = prior("a red circle", num_inference_steps=3, generator=0).image_embeds
    fresh = KandinskyV22PriorPipeline.from_pipe(prior)("a red circle", num_inference_steps=3, generator=0).image_embeds
    np.testing.assert_array_equal(other, fresh)
    assert np.abs(other - before).max() > 1e-4
    prior.prior = plain
    np.testing.assert_array_equal(prior("a red circle", num_inference_steps=3, generator=0).image_embeds, before)
