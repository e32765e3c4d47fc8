"""Hooks: an attention function of one's own, and what a network computes inside.

Both work on a copy of the network's structure that shares its arrays. The network itself is as before, so an ordinary
call compiles to the same program, and there is no state that a transformation of JAX could miss. Flax's `nnx.capture`
writes to the network's modules, which it refuses for a network from outside a `jit` or `scan`.

Modules are named by the dotted paths of their attributes, which are the reference's, such as
`down_blocks.1.attentions.0`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Bool, Float, PyTree
from kandinsky_jax.models.attention import attend, attend_after, attention_weights
from kandinsky_jax.models.structure import copy_structure, named_modules, replace_module

KeyValue = tuple[jax.Array, jax.Array]
P = ParamSpec("P")
R = TypeVar("R")
N = TypeVar("N", bound=nnx.Module)


class AttentionFunction(Protocol):
    """What may stand in the place of `kandinsky_jax.models.attend`."""

    def __call__(
        self,
        query: Float[Array, "B T heads head_dim"],
        key: Float[Array, "B S heads head_dim"],
        value: Float[Array, "B S heads head_dim"],
        mask: Bool[Array, "..."] | None,
        *,
        name: str,
    ) -> Float[Array, "B T heads*head_dim"]:
        """Attend.

        Args:
            query: `[B, T, heads, head_dim]`.
            key, value: `[B, S, heads, head_dim]`. In the UNet the 32 image tokens come first and then the T pixels; in
                the prior the text's tokens and then the step's three.
            mask: bool, broadcastable to `[B, heads, T, S]`, True is visible; None in the UNet.
            name: of the attention module that calls, such as `mid_block.attentions.0`.
        Returns:
            `[B, T, heads * head_dim]`.
        """


class AttentionLayer(nnx.Module):
    """Base of the networks' attention modules, on which `with_attention` and `capture` act."""

    attention_function: AttentionFunction | None = None
    attention_name: str = ""
    record_weights: Callable[[jax.Array], None] | None = None

    def attend(
        self,
        query: Float[Array, "B T heads head_dim"],
        key: Float[Array, "B S heads head_dim"],
        value: Float[Array, "B S heads head_dim"],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "B T heads*head_dim"]:
        """Attend by the layer's function; arguments and result as in `AttentionFunction`."""
        if self.record_weights is not None:
            self.record_weights(attention_weights(query, key, mask))
        if self.attention_function is None:
            return attend(query, key, value, mask)
        attended = self.attention_function(query, key, value, mask, name=self.attention_name)
        shape, needed = list(jnp.shape(attended)), [*query.shape[:2], query.shape[2] * query.shape[3]]
        if shape != needed:
            raise ValueError(
                f"the attention function returned the shape {shape} in {self.attention_name}; needed is "
                f"[B, T, heads * head_dim], {needed}"
            )
        return attended

    def attend_after(
        self,
        query: Float[Array, "B T heads head_dim"],
        past: KeyValue,
        key: Float[Array, "B T2 heads head_dim"],
        value: Float[Array, "B T2 heads head_dim"],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "B T heads*head_dim"]:
        """Attend to keys and values `[B, heads, S, head_dim]` that are kept, and then to new ones."""
        if self.attention_function is None and self.record_weights is None:
            return attend_after(query, past, key, value, mask)
        keys = jnp.concatenate([past[0].swapaxes(1, 2), key], axis=1)
        if self.attention_function is not None:
            return self.attend(query, keys, jnp.concatenate([past[1].swapaxes(1, 2), value], axis=1), mask)
        if self.record_weights is not None:
            self.record_weights(attention_weights(query, keys, mask))
        return attend_after(query, past, key, value, mask)


def with_attention(network: N, function: AttentionFunction | None) -> N:
    """Return a network with the same arrays whose attentions call a function of one's own.

    Args:
        network: a UNet, a prior, MoVQ or a CLIP tower.
        function: see `AttentionFunction`. For the ordinary attention, it calls `kandinsky_jax.models.attend`. It is
            part of a pipeline's compiled program: with the same function again, nothing is compiled anew. None is the
            ordinary attention again.
    """
    if function is not None and not callable(function):
        raise TypeError(f"function must be a function such as kandinsky_jax.models.attend, got {quote(function)}")
    copy = copy_structure(network)
    for name, module in list(named_modules(copy)):
        if isinstance(module, AttentionLayer):
            module.attention_function, module.attention_name = function, name
    return copy


def capture(function: Callable[P, R], names: str | re.Pattern[str]) -> Callable[P, tuple[R, dict[str, PyTree]]]:
    """Wrap a network, or a method of one, so that it also returns what its modules compute.

    Args:
        function: a network, for its `__call__`, or a bound method such as `prior.condition`.
        names: a regular expression that whole names of modules match, or whole names of attention modules followed by
            `.weights`.
    Returns:
        a function of the same arguments that returns the output and a dictionary by name. A module's entry is what it
        returns: `[B, h, w, C]` of the UNet's ResNet blocks, attentions, middle block and up blocks; a list of these of
        a down block, one per layer and the last its output; `[B, 3, D]` of the prior's blocks. `.weights` are the
        attention's weights `[B, heads, T, S]`, float32, see `AttentionFunction` for T and S; they are those of the
        ordinary attention, also where a function of one's own stands in its place.
        It is as fit for `jit`, `grad`, `vmap` and `scan` as the network.
    Raises:
        TypeError: for anything but a network or a method of one, or for several names instead of one expression.
        ValueError: when called, where no module of such a name is called, or with a feature cache.
    """
    network: Any = getattr(function, "__self__", function)
    if not isinstance(network, nnx.Module):
        raise TypeError(f"capture takes a network or a method of one, got {quote(function)}")
    if not isinstance(names, str | re.Pattern):
        raise TypeError(f"names must be one regular expression, such as 'mid_block|up_blocks.*', got {quote(names)}")
    method = "__call__" if network is function else function.__name__
    try:
        pattern = re.compile(names)
    except re.error as error:
        raise ValueError(f"{quote(names)} is not a regular expression: {error}") from None

    @functools.wraps(getattr(network, method))
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> tuple[R, dict[str, PyTree]]:
        if kwargs.get("cache") is not None:
            raise ValueError("capture does not go into an evaluation with a cache; leave cache out")
        attention: Any = kwargs.pop("attention", None)
        copy = copy_structure(network) if attention is None else with_attention(network, attention)
        captured: dict[str, PyTree] = {}
        known = _install(copy, pattern, captured)
        output = getattr(copy, method)(*args, **kwargs)
        if not captured:
            some = ", ".join(known[:: max(1, len(known) // 5)])
            raise ValueError(f"{quote(names)} matches no module that is called; names are such as {some}")
        return output, captured

    return wrapped


class _Recorded(nnx.Module):
    """Stands in a module's place and keeps what it returns."""

    def __init__(self, module: nnx.Module, record: Callable[[PyTree], None]):
        self.module, self.record = module, record

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        output = self.module(*args, **kwargs)
        self.record(output)
        return output

    def condition(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        output = self.module.condition(*args, **kwargs)
        self.record(output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def _install(network: nnx.Module, pattern: re.Pattern[str], captured: dict[str, PyTree]) -> list[str]:
    """Let the modules of matching names write to `captured`; return the names of all modules."""
    modules = dict(named_modules(network))
    for name, module in modules.items():
        weights = f"{name}.weights"
        if isinstance(module, AttentionLayer) and pattern.fullmatch(weights):
            module.record_weights = functools.partial(captured.__setitem__, weights)
        if pattern.fullmatch(name):
            replace_module(network, name, _Recorded(module, functools.partial(captured.__setitem__, name)))
    return list(modules)
