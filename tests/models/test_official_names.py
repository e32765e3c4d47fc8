"""Every network, built from its official configuration, has exactly the official file's tensors."""

import json
from pathlib import Path

import pytest

from kandinsky_jax import models
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.checkpoint.tensor_names import torch_name, torch_shape
from kandinsky_jax.models.layers import abstract
from tests.conftest import OFFICIAL, official_config

CLASSES = {
    "unet": models.UNet2DConditionModel,
    "movq": models.VQModel,
    "prior": models.PriorTransformer,
    "text_encoder": models.CLIPTextModelWithProjection,
    "image_encoder": models.CLIPVisionModelWithProjection,
}
COMPONENTS = sorted(path.parent.relative_to(OFFICIAL) for path in OFFICIAL.glob("*/*/config.json"))
TENSORS = json.loads((OFFICIAL / "tensors.json").read_text())


def listed_under(component: Path) -> str:
    """The key of `tensors.json`; the three MoVQs are one entry."""
    name = component.as_posix()
    return name if name in TENSORS else next(key for key in TENSORS if key.startswith(component.name + " "))


@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_names_and_shapes_are_the_official_ones(component: Path):
    cls = CLASSES[component.name]
    module = abstract(cls, cls.CONFIG.from_dict(official_config(component.parent.name, component.name)))
    ours = {torch_name(name): list(torch_shape(name, leaf.shape)) for name, leaf in flat_params(module).items()}
    assert ours == TENSORS[listed_under(component)]


def test_every_official_list_is_checked():
    assert {listed_under(component) for component in COMPONENTS} == TENSORS.keys()
