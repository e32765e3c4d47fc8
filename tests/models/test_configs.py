"""Unsupported configuration fields that would change a result raise an error that names them."""

from __future__ import annotations

import json

import pytest

from kandinsky_jax import ConfigError
from kandinsky_jax.models import NETWORKS
from tests.conftest import SHAPES_MODEL


def shapes_config(cls: type) -> dict:
    """The `config.json` of a network of the model of shapes."""
    for path in SHAPES_MODEL.glob("*/*/config.json"):
        config = json.loads(path.read_text())
        if cls.__name__ in (config.get("_class_name"), *config.get("architectures", [])):
            return config
    raise AssertionError(cls)


FIXED = [(cls, field) for cls in NETWORKS.values() for field in cls.CONFIG.FIXED]


@pytest.mark.parametrize(("cls", "field"), FIXED, ids=[f"{cls.__name__}-{field}" for cls, field in FIXED])
def test_unsupported_value_is_an_error_that_names_the_field(cls, field: str):
    raw = shapes_config(cls)
    for allowed in cls.CONFIG.FIXED[field]:
        assert cls.CONFIG.from_dict(raw | {field: allowed}) == cls.CONFIG.from_dict(raw)
    for other in ("something else", 7, ["a"], {"a": 1}):
        with pytest.raises(
            ConfigError, match=rf"^FILE describes a {cls.__name__} .*: {field}=.* is not supported, only"
        ):
            cls.CONFIG.from_dict(raw | {field: other}, "FILE")


def test_every_network_with_fixed_fields_is_checked():
    assert {cls.__name__ for cls, _ in FIXED} == {"PriorTransformer", "UNet2DConditionModel", "VQModel"}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("VQModel", {"norm_num_groups": 17}, "norm_num_groups=17"),
        ("VQModel", {"norm_num_groups": 8, "block_out_channels": [8, 8]}, "no multiples of 32"),
        ("UNet2DConditionModel", {"norm_num_groups": 17}, "norm_num_groups=17"),
    ],
)
def test_groups_that_do_not_divide_the_channels_are_named(name, changes, named):
    cls = NETWORKS[name]
    with pytest.raises(ConfigError, match=named):
        cls.CONFIG.from_dict(shapes_config(cls) | changes)


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_configs(cls):
    raw = shapes_config(cls)
    config = cls.CONFIG.from_dict(raw)
    ignored = dict.fromkeys(cls.CONFIG.IGNORED, "anything") | {"_name_or_path": "somewhere"}
    assert cls.CONFIG.from_dict(raw | ignored) == config
    assert cls.CONFIG.from_dict(config.to_dict()) == config
    wrong = dict.fromkeys(cls.CONFIG.FIXED, "something else") | {"new_field": 1, "newer_field": 2}
    for field, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"{field}="):
            cls.CONFIG.from_dict(raw | {field: value})
    with pytest.raises(ConfigError, match=r"newer_field=2 is a field|and \d+ more") as raised:
        cls.CONFIG.from_dict(raw | wrong)
    assert len(str(raised.value)) < 500
