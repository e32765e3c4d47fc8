"""A request as the pipelines' validated calls, which all its images share; nothing has run on a device yet."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from kandinsky_jax.checkpoint.tokenizer import whole_text
from kandinsky_jax.diffusion.inpainting import latent_repaint_mask
from kandinsky_jax.pipelines.decoder import DecoderRequest
from kandinsky_jax.pipelines.emb2emb import Emb2EmbOptions
from kandinsky_jax.pipelines.inpaint import KandinskyV22InpaintPipeline
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.pipelines.options import PriorOptions
from kandinsky_jax.pipelines.prior import PriorPipeline, PriorRequest, TextEncoding
from kandinsky_jax.serve.batching.rows import schedule_rows
from kandinsky_jax.serve.requests import MIX, VARY, ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel


@dataclasses.dataclass
class PriorPlan:
    """One term of an embedding: a prompt for the prior, or a picture for the vision tower.

    Args:
        pipe: the prior.
        request: of a prompt, for one image and without its generator; None for a picture.
        pictures: what the vision tower encodes, see `PriorPipeline._pictures`.
        rows: the prior's schedule as `schedule_rows`.
        encodings: the encoded prompt, and what it is guided away from (None without guidance), once computed.
    """

    pipe: PriorPipeline
    request: PriorRequest | None = None
    pictures: Any = None
    rows: np.ndarray | None = None
    encodings: tuple[TextEncoding, TextEncoding | None] | None = None
    embed: np.ndarray | None = None  # of the picture, [1, D], once computed

    def encoded(self) -> tuple[TextEncoding, TextEncoding | None]:
        """Return the encoded prompts, computed once for all images; warnings would put them into the server's log."""
        if self.encodings is None:
            assert self.request is not None
            cond = self.pipe._encode_cond(self.request, warn=False)
            uncond = self.pipe._encode_uncond(self.request, cond) if self.request.guidance.uses_uncond else None
            self.encodings = cond, uncond
        return self.encodings

    def picture_embed(self) -> np.ndarray:
        """Return the picture's embedding, `[1, D]`, computed once for all images."""
        if self.embed is None:
            self.embed = self.pipe._encode_pictures(self.pictures)
        return self.embed


class RequestPlan:
    """A complete request, checked by the pipelines that will run it.

    Args:
        model: what is served.
        request: complete.
    Raises:
        ValueError, TypeError: for what the pipelines do not take.
    """

    def __init__(self, model: ServedModel, request: ImageRequest):
        self.model, self.request = model, request
        self.pipe: Any = model.pipe(request.mode)
        self.decoder: Any = model.decoder(request)
        self.priors = self._priors()
        self.decoder_request = self._decoder_request()
        kept = None
        if isinstance(self.decoder, KandinskyV22InpaintPipeline):
            kept = self.decoder._levels(self.decoder_request)
        own = self.decoder_request
        _check_mask(own)
        self.notes = self._notes()
        self.decoder_rows = schedule_rows(own.schedule, own.guidance.scale, kept)

    @property
    def guided(self) -> bool:
        """Whether the decoder evaluates uncond."""
        return self.decoder_request.guidance.uses_uncond

    @property
    def prior_guided(self) -> bool:
        """Whether the prior evaluates uncond."""
        return any(plan.request is not None and plan.request.guidance.uses_uncond for plan in self.priors)

    @property
    def evaluations(self) -> tuple[int, int]:
        """Evaluations of the prior and of the decoder for one image."""
        batches = [(plan.request.batches, plan.rows) for plan in self.priors if plan.request is not None]
        return sum(count * len(rows) for count, rows in batches if rows is not None), len(self.decoder_rows)

    def _notes(self) -> tuple[str, ...]:
        """Return what the client should know: which prompts CLIP does not read whole."""
        request, prior = self.request, self.pipe.prior_pipe
        most = prior.text_encoder.config.max_position_embeddings
        texts = [("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")]
        texts += [(f"items[{i}]", item) for i, item in enumerate(request.items) if isinstance(item, str)]
        counts = [(name, len(whole_text(prior.tokenizer, text))) for name, text in texts]
        return tuple(
            f"{name} has {count} tokens, of which CLIP reads {most}: its end is not used"
            for name, count in counts
            if count > most
        )

    def _priors(self) -> list[PriorPlan]:
        """Return the terms of the embedding, and at last the negative prompt of a mix, if it has one."""
        request, prior = self.request, self.pipe.prior_pipe
        if request.mode == VARY:
            options = Emb2EmbOptions(
                request.prompt, request.image, **self._prior_settings(), strength=request.strength or 0.0
            )
            return [_prior_plan(self.model.vary_prior, options)]
        if request.mode != MIX:
            return [_prior_plan(prior, PriorOptions(request.prompt, **self._prior_settings()))]
        shared = self._prior_settings() | {"negative_prompt": None}
        items = [*request.items, *([request.negative_prompt] if request.negative_prompt else [])]
        return [
            _prior_plan(prior, PriorOptions(item, **shared))
            if isinstance(item, str)
            else PriorPlan(prior, pictures=prior._pictures(item, f"[{i}]"))
            for i, item in enumerate(items)
        ]

    def _prior_settings(self) -> dict[str, Any]:
        request = self.request
        return {
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.prior_num_inference_steps,
            "guidance_scale": request.prior_guidance_scale,
        }

    def _decoder_request(self) -> DecoderRequest:
        """Return the validated call of the decoder for one image."""
        request = self.request
        given: dict[str, Any] = {
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        if request.mode in MODES:
            mode = MODES[request.mode]
            given |= {name: getattr(request, name) for name in mode.pictures}
            given |= {"strength": request.strength} if mode.takes_strength else {}
            given |= {"paste_back": request.paste_back} if "mask_image" in mode.pictures else {}
        return self.decoder._request(self.pipe.OPTIONS(request.prompt, **given), 1)


def _check_mask(request: DecoderRequest) -> None:
    """Raise RequestError for a mask of which nothing is repainted."""
    mask = request.repaint_mask
    if mask is not None and not latent_repaint_mask(mask, request.h, request.w).any():
        raise RequestError(
            "mask_image repaints nothing: white is repainted, and parts smaller than a latent are lost", "mask_image"
        )


def _prior_plan(pipe: PriorPipeline, options: Any) -> PriorPlan:
    request = pipe._request(options)
    return PriorPlan(pipe, request, rows=schedule_rows(request.schedule, request.guidance.scale))
