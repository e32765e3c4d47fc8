"""From an object of options to the arguments of a call: signature, defaults and documentation.

What there is to say of how options are composed is in `kandinsky_jax.pipelines.options`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from kandinsky_jax.pipelines.call_defaults import with_defaults

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
ResultT = TypeVar("ResultT")


class CallOptions:
    """Base of a call's options; their values are the user's, not checked yet."""


def takes(
    options: Callable[P, OptionsT],
) -> Callable[[Callable[[Any, OptionsT], ResultT]], Callable[Concatenate[Any, P], ResultT]]:
    """Decorate a method that takes one options object, to take the options as arguments.

    Args:
        options: a dataclass composed of this module's. Its signature and documentation become the method's.
    """

    def decorate(method: Callable[[Any, OptionsT], ResultT]) -> Callable[Concatenate[Any, P], ResultT]:
        own, fields = inspect.signature(method), inspect.signature(options)
        parameters = [next(iter(own.parameters.values())), *fields.parameters.values()]

        @functools.wraps(method)
        def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
            check_arguments(f"{type(self).__name__}.{method.__name__}", fields, args, kwargs)
            return method(self, options(*args, **with_defaults(self, fields.parameters, args, kwargs)))

        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=own.return_annotation
        )
        call.__doc__ = _with_arguments(inspect.getdoc(method) or "", options)
        return call

    return decorate


def check_arguments(
    function: str, signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise TypeError, in the name of a function, for arguments that its options do not take."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((name for name in kwargs if name not in signature.parameters), "")
        close = difflib.get_close_matches(unknown, signature.parameters, 1)
        close = close or [name for name in signature.parameters if unknown in name.split("_")]
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}: {error}{hint}") from None


def _with_arguments(text: str, options: Callable[..., object]) -> str:
    """Insert the documentation of the options after the first paragraph of a method's."""
    summary, _, rest = text.partition("\n\n")
    return "\n".join([summary, "", "Args:", *_argument_blocks(options), rest.strip("\n")]).rstrip() + "\n"


def _argument_blocks(options: Callable[..., object]) -> list[str]:
    """Return the documentation of each group of options, in the order of the arguments."""
    assert isinstance(options, type)
    groups = [group for group in reversed(options.__mro__) if group is not options and issubclass(group, CallOptions)]
    docs = [inspect.getdoc(group) or "" for group in groups]
    return [doc.partition("\nArgs:\n")[2].rstrip() for doc in docs if "\nArgs:\n" in doc]


def option_docs(options: Callable[..., object]) -> dict[str, str]:
    """Return the documentation of each option of a call, on one line.

    Args:
        options: a dataclass composed of this module's.
    """
    found: dict[str, str] = {}
    for block in _argument_blocks(options):
        for entry in re.split(r"\n(?=    \S)", block):
            names, _, text = " ".join(entry.split()).partition(": ")
            found |= dict.fromkeys(names.split(", "), text)
    return found
