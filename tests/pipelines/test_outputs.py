"""Pipelines' outputs behave as diffusers' `BaseOutput`: a dictionary by name, a tuple by number, and attributes."""

from __future__ import annotations

import copy
import pickle

import jax
import numpy as np
import pytest
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput as Reference

from kandinsky_jax import ImagePipelineOutput, KandinskyPriorPipelineOutput

A, B = np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32)
USES = {
    "to_tuple": lambda out: out.to_tuple(),
    "item": lambda out: out["image_embeds"],
    "number": lambda out: out[1],
    "slice": lambda out: out[:1],
    "attribute": lambda out: out.negative_image_embeds,
    "iteration": list,
    "keys": lambda out: list(out.keys()),
    "values": lambda out: list(out.values()),
    "length": len,
    "membership": lambda out: ("image_embeds" in out, "images" in out),
    "keyword arguments": lambda out: (lambda **given: given)(**out),
    "dict": dict,
    "dictionary type": lambda out: isinstance(out, dict),
    "get": lambda out: out.get("images", "none"),
    "unknown": lambda out: out["images"],
    "beyond": lambda out: out[2],
    "attribute set": lambda out: (setattr(out, "image_embeds", B), out["image_embeds"]),
    "item set": lambda out: (out.__setitem__("image_embeds", B), out.image_embeds),
    "removed": lambda out: out.pop("image_embeds"),
    "deleted": lambda out: out.__delitem__("image_embeds"),
    "merged": lambda out: out.update(image_embeds=B),
    "defaulted": lambda out: out.setdefault("image_embeds", B),
    "copied": lambda out: copy.deepcopy(out).to_tuple(),
    "pickled": lambda out: pickle.loads(pickle.dumps(out)).to_tuple(),
    "text": repr,
    "without negative": lambda out: list(type(out)(A, None)),
}


@pytest.mark.parametrize("use", USES)
def test_an_output_is_used_as_the_reference_is(use):
    def result(cls):
        try:
            return USES[use](cls(A, B))
        except Exception as error:
            return isinstance(error, Exception)

    ours, theirs = result(KandinskyPriorPipelineOutput), result(Reference)
    assert str(ours) == str(theirs)


def test_outputs_are_pytrees():
    out = KandinskyPriorPipelineOutput(A, None)
    doubled = jax.tree.map(lambda x: 2 * x, out)
    assert isinstance(doubled, KandinskyPriorPipelineOutput)
    assert doubled.image_embeds[0, 0] == 2
    assert doubled.negative_image_embeds is None
    assert jax.jit(lambda x: x)(out).to_tuple()[0].shape == (1, 3)


def test_calls_return_them(ours):
    prior, decoder = ours["KandinskyV22PriorPipeline"], ours["KandinskyV22Pipeline"]
    short = {"num_inference_steps": 4, "generator": 0}
    found = prior("a red circle", **short)
    assert type(found) is KandinskyPriorPipelineOutput
    size = {"height": 64, "width": 64, "output_type": "np"}
    generated = decoder(**found, **short, **size)
    assert type(generated) is ImagePipelineOutput
    plain = decoder(*found.to_tuple(), **short, **size, return_dict=False)
    assert type(plain) is tuple
    assert np.array_equal(generated[0], plain[0])
    with pytest.raises(TypeError, match=r"image_embeds must be an array, got 'image_embeds'.*\*\*output"):
        decoder(*found, **short, **size)
