"""Validation of a pipeline's components; those of diffusers are converted where the conversion is exact."""

from __future__ import annotations

from typing import Any

from kandinsky_jax.checkpoint import LazyNetwork
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models.compatibility import warn_once
from kandinsky_jax.pipelines.loading import expected_types
from kandinsky_jax.schedulers import SCHEDULERS, Scheduler, SchedulerError, scheduler_from_config


def as_component(owner: object, name: str, value: object) -> Any:
    """Check a component of a pipeline, and convert it where needed.

    Args:
        owner: the pipeline.
        name: the component's, such as "unet" or "prior_scheduler".
        value: our component. A scheduler of diffusers or an image processor of transformers is converted by its
            configuration, and a network that `torch.compile` wrapped is unwrapped.
    Raises:
        TypeError: for anything else, with what to write instead.
    """
    expected = expected_types(name)
    if isinstance(value, expected) or (isinstance(value, LazyNetwork) and issubclass(value.cls, expected)):
        return value
    if compiled := [part for part in _within_torch_compile(value) if isinstance(part, expected)]:
        warn_once(
            owner, "torch.compile", f"torch.compile({name}) has no effect here: XLA compiles networks by itself", 4
        )
        return compiled[0]
    library = type(value).__module__.partition(".")[0]
    if expected == (Scheduler,) and library == "diffusers":
        return _scheduler(owner, name, value)
    if expected == (CLIPImageProcessor,) and library == "transformers" and hasattr(value, "to_dict"):
        return CLIPImageProcessor._from_dict(value.to_dict())
    wanted = " or ".join(cls.__name__ for cls in expected)
    given = value.cls if isinstance(value, LazyNetwork) else type(value)
    raise TypeError(
        f"{type(owner).__name__}.{name} must be a {wanted} of kandinsky_jax, got {_named(value, given)}"
        + _instead(name, value, wanted, library)
    )


def _within_torch_compile(value: object) -> list[object]:
    """Return the objects that a function made by `torch.compile` refers to."""
    inner = getattr(value, "_torchdynamo_orig_callable", None)
    return [inner, getattr(inner, "__self__", None)] + [
        c.cell_contents for c in getattr(inner, "__closure__", None) or ()
    ]


def _named(value: object, given: type) -> str:
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__name__}, not an instance"
    if value is None:
        return "None"
    plain = given.__module__ in ("builtins", __name__) or given.__module__.startswith("kandinsky_jax")
    return given.__name__ if plain else f"a {given.__module__}.{given.__name__}"


def _instead(name: str, value: object, wanted: str, library: str) -> str:
    if wanted == "Scheduler":
        return f"; write pipe.{name} = kandinsky_jax.DDIMScheduler.from_config(pipe.{name}.config), or another class"
    if library in ("diffusers", "transformers", "torch") and not isinstance(value, type):
        return f"; write it with save_pretrained(FOLDER), and load it with kandinsky_jax.load_network({wanted}, FOLDER)"
    if callable(value) and library != __name__.partition(".")[0]:
        return "; networks are compiled by XLA already, so leave wrappers out"
    return ""


def _scheduler(owner: object, name: str, value: object) -> Scheduler:
    """Convert a scheduler of diffusers."""
    cls = type(value) if not isinstance(value, type) else value
    if isinstance(value, type) or not hasattr(value, "config") or cls.__name__ not in SCHEDULERS:
        raise TypeError(
            f"{type(owner).__name__}.{name}: diffusers' {shorten(cls.__name__, 60)} cannot be used here; write "
            f"pipe.{name} = kandinsky_jax.DDIMScheduler.from_config(pipe.{name}.config), or another of kandinsky_jax's "
            f"{len(SCHEDULERS)} schedulers"
        )
    try:
        return scheduler_from_config({**value.config, "_class_name": cls.__name__}, f"diffusers' {cls.__name__}")
    except SchedulerError as error:
        raise SchedulerError(f"{type(owner).__name__}.{name}: {error}") from None
