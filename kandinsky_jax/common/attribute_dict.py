"""An immutable dictionary with attribute access, like diffusers' configurations."""

from __future__ import annotations

from typing import Any, NoReturn, Self


class AttributeDict(dict[str, Any]):
    """`config["beta_start"]`, `config.beta_start` and `config.get("beta_start")` are one."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(map(str, self))}")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "a configuration is immutable: make another object with other fields, as "
            "Scheduler.from_config(scheduler.config, name=value) does, or take dict(config)"
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, object]]]:
        return type(self), (dict(self),)
