"""Scales of a LoRA file's changes: peft's configuration, interpreted by peft's rules.

diffusers writes it into the header of its safetensors files (`lora_adapter_metadata`), peft into `adapter_config.json`.
An unsupported field that would change the result is an error; none is ignored.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping

import regex

from kandinsky_jax.common.errors import shorten


class ScalingError(ValueError):
    """A configuration cannot be used; the message does not contain the path."""


# Fields without an effect on what a trained adapter changes. `fan_in_fan_out` is for layers that no network here has;
# peft turns it off for linear ones. The layers of a file are those that its tensors name, as in diffusers.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# Others change the network's own weights when the adapter is made.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_OFF = (None, False, "none")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # peft's
# Regular expressions come from the file, and some would never terminate: a limit for matching all of them.
_PATTERN_LENGTH, _SECONDS = 1000, 10.0
_UNBOUNDED = re.compile(r"\{(?!\d{1,2}(,\d{1,2})?\})|\(\?(?!:)|\\[LNpPRg]")  # large counts, and what only `regex` knows


class Scaling:
    """The scale of each layer's change.

    Args:
        about: the fields of peft's `LoraConfig`.
    Raises:
        ScalingError: naming a field that is not supported or is invalid.
    """

    def __init__(self, about: Mapping[str, object]):
        kind = about.get("peft_type", "LORA")
        if kind != "LORA":
            raise ScalingError(f"is an adapter of peft's type {shorten(kind, 40)}, only LORA is supported")
        for name, value in about.items():
            if name not in _WITHOUT_EFFECT | _USED and not (value in _OFF or value == [] or value == {}):
                raise ScalingError(f"is made with {shorten(name, 40)} = {shorten(value, 60)}, which is not supported")
        if (bias := about.get("bias", "none")) not in _OFF:
            raise ScalingError(f"is made with bias = {shorten(bias, 40)}, which is not supported; only none is")
        init = about.get("init_lora_weights", True)
        if not isinstance(init, str | bool | None) or init not in _PLAIN_INITS:
            raise ScalingError(
                f"is made with init_lora_weights = {shorten(init, 40)}, which changes the network's own weights and is "
                "not supported; let peft convert it when it saves (path_initial_model_for_weight_conversion)"
            )
        self._root = about.get("use_rslora", False)
        if self._root not in (True, False, None):
            raise ScalingError(f"has use_rslora = {shorten(self._root, 40)}, needed is true or false")
        self._rank = _rank("r", about.get("r", _DEFAULT_RANK))
        self._alpha = check_alpha("lora_alpha", about.get("lora_alpha", _DEFAULT_ALPHA))
        self._ranks = _Patterns("rank_pattern", about.get("rank_pattern"), _rank)
        self._alphas = _Patterns("alpha_pattern", about.get("alpha_pattern"), check_alpha)

    def of(self, layer: str, rank: int) -> float:
        """Return the factor of a layer's change.

        Args:
            layer: its dotted name.
            rank: of its tensors.
        Raises:
            ScalingError: where the configuration gives the layer another rank.
        """
        wanted = self._ranks.of(layer, self._rank)
        if wanted != rank:
            raise ScalingError(f"has rank {rank} at {shorten(layer, 80)}, its configuration says {wanted}")
        return self._alphas.of(layer, self._alpha) / (math.sqrt(rank) if self._root else rank)


class _Patterns:
    """Values for the layers that regular expressions match, by peft's rule (`get_pattern_key`).

    An expression has to match the end of a layer's name, from a dot on; the first one that does counts.
    """

    def __init__(self, field: str, patterns: object, check: Callable[[str, object], float]):
        self._field = field
        if not isinstance(patterns, Mapping | None):
            raise ScalingError(f"has {field} = {shorten(patterns, 60)}, needed is an object")
        self._values = [
            (_compile(field, key), check(f"{field} {shorten(key, 60)}", value))
            for key, value in (patterns or {}).items()
        ]
        self._left = _SECONDS

    def of(self, layer: str, default: float) -> float:
        """The value of the first expression that matches a layer's name, or `default`."""
        started = time.monotonic()
        found_value = default
        for pattern, value in self._values:
            remaining = self._left - (time.monotonic() - started)
            try:
                found = pattern.match(layer, timeout=max(remaining, 1e-3))
            except TimeoutError:
                found, remaining = None, 0.0
            if remaining <= 0:
                raise ScalingError(f"has regular expressions in {self._field} that take too long")
            if found:
                found_value = value
                break
        self._left -= time.monotonic() - started
        return found_value


def _compile(field: str, key: object) -> regex.Pattern:
    """Compile a key of a pattern as peft does, without constructs of unbounded time or memory."""
    if not isinstance(key, str) or len(key) > _PATTERN_LENGTH or _UNBOUNDED.search(key) or key.count("{") > 2:
        raise ScalingError(f"has {shorten(key, 60)} in {field}, which is not supported as a layer's name or pattern")
    try:
        return regex.compile(rf"(.*\.)?({key})$")
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ScalingError(f"has {shorten(key, 60)} in {field}, no regular expression: {error}") from None


def check_alpha(field: str, value: object) -> float:
    """Return a finite number as a float, or raise ScalingError. As in peft, zero means no change."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ScalingError(f"has {field} = {shorten(value, 60)}, needed is a finite number")


def _rank(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScalingError(f"has {field} = {shorten(value, 60)}, needed is a positive integer")
    return value
