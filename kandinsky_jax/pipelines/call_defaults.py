"""Arguments of calls that are not given: a pipeline may have other values for them than the usual ones.

They are those of `load_fast`; `Pipeline._call_defaults` has them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
PipelineT = TypeVar("PipelineT")
ResultT = TypeVar("ResultT")


def with_defaults(
    pipe: Any, names: Collection[str], args: Sequence[object], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of a call, completed by the pipeline's defaults for what is not given.

    Args:
        names: of the call's parameters, in their order.
    """
    pipe._settle_scheduler()
    given = {*list(names)[: len(args)], *kwargs}
    defaults: dict[str, Any] = pipe._call_defaults()
    return {name: value for name, value in defaults.items() if name in names and name not in given} | dict(kwargs)


def takes_defaults(
    method: Callable[Concatenate[PipelineT, P], ResultT],
) -> Callable[Concatenate[PipelineT, P], ResultT]:
    """Decorate a method of a pipeline, to take the pipeline's defaults for arguments that are not given."""
    names = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def call(self: PipelineT, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return method(self, *args, **with_defaults(self, names, args, kwargs))

    return call
