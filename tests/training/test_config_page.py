"""docs/training.md has every field of a configuration, with its default, and says which may change."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest

from kandinsky_jax.training.config import Config
from kandinsky_jax.training.run_record import FREE, STRUCTURE

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
ROW = r"^\| `(\w+)`( \*{1,2})? \| (.*?) \| (.+) \|$"
TABLES = {"": "## Fields", "mesh": "### [mesh]", "optimizer": "### [optimizer]", "lora": "### [lora]"}
TABLES |= {"distillation": "### [distillation]", "dpo": "### [dpo]"}


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_every_field_with_its_default(table):
    cls = typing.get_type_hints(Config)[table] if table else Config
    text = re.split(r"^##+ ", PAGE.partition(TABLES[table] + "\n")[2], flags=re.MULTILINE)[0]
    rows = re.findall(ROW, text, re.MULTILINE)
    fields = {field.name: field for field in dataclasses.fields(cls) if table or field.name not in TABLES}
    assert sorted(name for name, *_ in rows) == sorted(fields)
    for name, stars, default, _ in rows:
        full = f"{table}.{name}" if table else name
        assert stars.strip() == ("" if full in FREE else "**" if full in STRUCTURE else "*"), full
        if full == "lora.pattern":
            continue
        expected = fields[name].default
        if expected is dataclasses.MISSING:
            assert default == "required", full
        elif expected is None:
            assert default == "none", full
        else:
            value = tomllib.loads(f"value = {default.strip('`')}")["value"]
            assert (tuple(value) if isinstance(value, list) else value) == expected, full
            assert isinstance(expected, tuple) or type(value) is type(expected), full
