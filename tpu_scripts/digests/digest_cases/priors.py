"""Both priors: embeddings of prompts and pictures, mixes, callbacks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from digest_cases import Case, inputs

PRIOR, EMB2EMB = "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": 0}
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "guided/one image/seed 0": ({}, True),
    "guided/one image/torch seed 3": ({"generator": ("torch", 3)}, True),
    "guided/two images/seed 3": ({"num_images_per_prompt": 2, "generator": 3}, False),
    "guided/two images/torch seed 3": ({"num_images_per_prompt": 2, "generator": ("torch", 3)}, False),
    "guided/two prompts": ({"prompt": inputs.PROMPTS, "generator": [1, 2]}, False),
    "guided/negative prompt": ({"negative_prompt": "red circle"}, True),
    "guided/negative prompt/torch seed 3": ({"negative_prompt": "red circle", "generator": ("torch", 3)}, False),
    "guided/long prompt": ({"prompt": "a very long prompt of many words " * 20}, False),
    "guided/empty prompt": ({"prompt": ""}, False),
    "guided/numpy out": ({"output_type": "np"}, False),
    "unguided/one image/seed 0": ({"guidance_scale": 1.0}, False),
    "unguided/two images/seed 3": ({"guidance_scale": 1.0, "num_images_per_prompt": 2, "generator": 3}, False),
}
SOLVERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def cases() -> list[Case]:
    """All cases of the module."""
    found = []
    for variant, (changes, quick) in VARIANTS.items():
        found.append(Case(f"prior/{variant}", functools.partial(_embed, PRIOR, changes), quick))
        extra = {"image": inputs.picture(), "strength": 0.7}
        found.append(Case(f"emb2emb prior/{variant}", functools.partial(_embed, EMB2EMB, extra | changes)))
    found.append(Case("emb2emb prior/embedding given", functools.partial(_from_embedding, 0.4)))
    found.append(Case("prior/latents given", _latents_given))
    found.append(Case("prior/callback sees every tensor", _callback))
    for name, short in ((PRIOR, "prior"), (EMB2EMB, "emb2emb prior")):
        for mix, changes in (
            ("seed 0", {}),
            ("torch seed 3", {"generator": ("torch", 3)}),
            ("two images", {"num_images_per_prompt": 2}),
            ("negative prior prompt", {"negative_prior_prompt": "red circle"}),
            ("negative prompt", {"negative_prompt": "red circle"}),
        ):
            run = functools.partial(_mix, name, changes)
            found.append(Case(f"{short}/interpolate/{mix}", run, quick=mix == "seed 0" and name == PRIOR))
    for solver in SOLVERS:
        found.append(Case(f"prior/solver {solver}", functools.partial(_with_solver, solver)))
    found.append(Case("prior/bfloat16/guided", _bfloat16))
    return found


def _embed(name: str, changes: dict[str, Any], _: Path) -> Any:
    return _call(inputs.pipeline(name, inputs.TINY), changes)


def _call(pipe: Any, changes: dict[str, Any]) -> Any:
    arguments = _arguments(changes)
    prompt = arguments.pop("prompt", inputs.PROMPTS[0])
    return dict(pipe(prompt, **arguments))


def _arguments(changes: dict[str, Any]) -> dict[str, Any]:
    import kandinsky_jax as kj

    arguments = OPTIONS | changes
    if isinstance(arguments["generator"], tuple):
        arguments["generator"] = kj.TorchGenerator(arguments["generator"][1])
    return arguments


def _from_embedding(strength: float, _: Path) -> Any:
    pipe = inputs.pipeline(EMB2EMB, inputs.TINY)
    given = inputs.embeds(pipe.prior.config.embedding_dim, 4)
    return _call(pipe, {"image": given, "strength": strength})


def _latents_given(_: Path) -> Any:
    pipe = inputs.pipeline(PRIOR, inputs.TINY)
    return _call(pipe, {"latents": inputs.embeds(pipe.prior.config.embedding_dim, 5)})


def _callback(_: Path) -> Any:
    seen: list[Any] = []
    pipe = inputs.pipeline(PRIOR, inputs.TINY)
    names = list(pipe._callback_tensor_inputs)  # as in diffusers

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append([step, float(timestep), {name: np.asarray(tensors[name]) for name in names}])
        return {}

    found = _call(pipe, {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names})
    return {"embeds": found, "seen": seen}


def _mix(name: str, changes: dict[str, Any], _: Path) -> Any:
    pipe = inputs.pipeline(name, inputs.TINY)
    items = [inputs.PROMPTS[0], inputs.picture(), inputs.embeds(pipe.prior.config.embedding_dim, 6), inputs.PROMPTS[1]]
    return dict(pipe.interpolate(items, [0.3, 0.3, 0.2, 0.2], **_arguments(changes)))


def _with_solver(solver: str, _: Path) -> Any:
    import kandinsky_jax as kj

    pipe = inputs.pipeline(PRIOR, inputs.TINY)
    before = pipe.scheduler
    try:
        pipe.scheduler = getattr(kj, solver).from_config(before.config)
        return _call(pipe, {"num_inference_steps": 4})
    finally:
        pipe.scheduler = before


def _bfloat16(_: Path) -> Any:
    return _call(inputs.pipeline(PRIOR, inputs.TINY, "bfloat16"), {})
