"""A dictionary whose items are attributes too, as diffusers' configurations are."""

from __future__ import annotations

from typing import Any


class AttributeDict(dict[str, Any]):
    """`config["beta_start"]`, `config.beta_start` and `config.get("beta_start")` are one."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(map(str, self))}")
