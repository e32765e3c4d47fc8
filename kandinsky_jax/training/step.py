"""The one training step: gradients of any loss, accumulated, clipped, AdamW, an average of the weights.

Weights and their average are float32, whatever the dtype that the networks compute in. The step is a pure function of
the state and a batch, compiled once: `state, metrics = trainer.step(state, batch, key)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from kandinsky_jax.errors import shorten
from kandinsky_jax.sharding import Rules
from kandinsky_jax.training.heap import keep_freed_memory
from kandinsky_jax.training.mesh import ROW, place_batch, places, whole

# (what is trained, batch, key) -> a float32 scalar, and with `frozen`, (what is trained, batch, key, frozen)
Loss = Callable[..., jax.Array]

# Parameters that are statistics of the data, which no optimizer may touch.
STATISTICS = ("clip_mean", "clip_std")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. Names and defaults are those of the reference's scripts where they have them.

    Args:
        learning_rate: after the warm-up.
        lr_scheduler: "constant", "linear" or "cosine" (to zero at `max_train_steps`).
        lr_warmup_steps: steps in which the rate rises from zero.
        max_train_steps: the end of the schedule.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon: of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).
        max_grad_norm: gradients are scaled down to this norm; None is no limit.
        gradient_accumulation_steps: parts of a batch that are done one after the other, for memory.
        ema_decay: of the average of the weights; None is no average.
        dtype: that the networks compute in; weights stay float32.
        remat: keep only the results of matrix products for the backward pass, and compute the rest again.
    """

    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_train_steps: int = 1000
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    gradient_accumulation_steps: int = 1
    ema_decay: float | None = None
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        faults = []
        if self.lr_scheduler not in SCHEDULES:
            faults.append(
                f"lr_scheduler={shorten(self.lr_scheduler, 40)!r} is not supported, only {', '.join(SCHEDULES)}"
            )
        for name in ("max_train_steps", "gradient_accumulation_steps"):
            if not 1 <= getattr(self, name) < 2**31:
                faults.append(f"{name} must be at least 1 and an int32, got {shorten(getattr(self, name))}")
        if not 0 <= self.lr_warmup_steps < 2**31:
            faults.append(f"lr_warmup_steps must not be negative, and an int32, got {shorten(self.lr_warmup_steps)}")
        for name in ("learning_rate", "adam_weight_decay", "adam_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                faults.append(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm <= math.inf:
            faults.append(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.dtype not in DTYPES:
            faults.append(f"dtype={shorten(self.dtype, 40)!r} is not supported, only {', '.join(DTYPES)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            faults.append(f"ema_decay must be between 0 and 1, got {self.ema_decay}")
        if faults:
            raise ValueError("; ".join(faults))

    def rate(self) -> optax.Schedule:
        """The learning rate by step."""
        ramp = optax.linear_schedule(0.0, self.learning_rate, self.lr_warmup_steps)
        rest = SCHEDULES[self.lr_scheduler](self.learning_rate, max(1, self.max_train_steps - self.lr_warmup_steps))
        return optax.join_schedules([ramp, rest], [self.lr_warmup_steps]) if self.lr_warmup_steps else rest


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
}


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32
    params: Any  # what is trained: a network's parameters, or changes to them; float32
    opt_state: Any
    ema: Any  # as params, or None


class Trainer:
    """The step of one loss.

    Args:
        loss: (what is trained, batch, key) -> a float32 scalar, the mean over the batch's first axis.
        settings: how to train.
        frozen: arrays that the loss wants besides and that nothing changes, such as the weights under a LoRA. They are
            an argument of the compiled program; arrays that a function closes over would be written into it.
        mesh: the devices to train on, see `kandinsky_jax.training.mesh`; None is JAX's default device, or wherever the
            parameters lie.
        rules: how what is trained is divided over the mesh's `fsdp`, see `kandinsky_jax.training.mesh.places`.
    """

    def __init__(
        self,
        loss: Loss,
        settings: Settings,
        frozen: Any = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
    ):
        self.settings, self.mesh, self.rules = settings, mesh, rules
        self.frozen = frozen if mesh is None or frozen is None else jax.device_put(frozen, places(mesh, frozen, rules))

        def gathering(params: Any, batch: Any, key: jax.Array, *frozen: Any) -> jax.Array:
            # In here, so that rematerialisation gathers the parameters once more and need not keep them.
            return loss(whole(mesh, params), batch, key, *(whole(mesh, tree) for tree in frozen))

        if jax.default_backend() == "cpu":
            keep_freed_memory()
        policy = jax.checkpoint_policies.checkpoint_dots
        self._loss = jax.checkpoint(gathering, policy=policy) if settings.remat else gathering
        clip = optax.identity() if settings.max_grad_norm is None else optax.clip_by_global_norm(settings.max_grad_norm)
        adam = optax.adamw(
            settings.rate(),
            settings.adam_beta1,
            settings.adam_beta2,
            settings.adam_epsilon,
            weight_decay=settings.adam_weight_decay,
        )
        self.optimizer = optax.chain(clip, optax.masked(adam, _trained), optax.masked(optax.set_to_zero(), _statistics))
        self._program = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any) -> TrainState:
        """The state before the first step; the parameters are copied to float32."""
        if self.mesh is None:
            return self._first(params)
        divided = jax.device_put(params, places(self.mesh, params, self.rules))
        where = places(self.mesh, jax.eval_shape(self._first, params), self.rules)
        return jax.jit(self._first, out_shardings=where)(divided)

    def _first(self, params: Any) -> TrainState:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
        ema = None if self.settings.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), ema)

    def step(self, state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; the arrays of `state` are used up.

        Args:
            state: from `init`, or from the step before.
            batch: arrays with one row per example.
            key: the same for every step.
        Returns:
            the next state, and "loss" and "gradient_norm", float32 scalars.
        """
        with self.ambient():
            return self._program(state, place_batch(self.mesh, batch), key, self.frozen)

    def lower(self, state: Any, batch: Any, key: Any, frozen: Any = None) -> Any:
        """The step's program for arrays of these shapes and places, for looking at what it costs."""
        with self.ambient():
            return self._program.lower(state, batch, key, frozen)

    def ambient(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh known to what is traced: an attention has to know that XLA divides it."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _step(
        self, state: TrainState, batch: Any, key: jax.Array, frozen: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradients = self._gradients(state.params, batch, jax.random.fold_in(key, state.step), frozen)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.settings.ema_decay is not None:
            # diffusers' EMAModel: a young average is short.
            decay = jnp.minimum(self.settings.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        # One bad picture must not spoil the weights: a step that is not finite changes nothing but its number.
        fine = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
        done = TrainState(state.step + 1, *kept)
        if self.mesh is not None:
            done = jax.lax.with_sharding_constraint(done, places(self.mesh, done, self.rules))
        return done, metrics

    def _gradients(self, params: Any, batch: Any, key: jax.Array, frozen: Any) -> tuple[jax.Array, Any]:
        further = () if frozen is None else (frozen,)
        parts = self.settings.gradient_accumulation_steps

        def of(part: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            if self.mesh is not None:
                part = jax.lax.with_sharding_constraint(part, NamedSharding(self.mesh, ROW))

            def loss(params: Any) -> jax.Array:
                # Out here, so that what is gathered are numbers of the dtype to compute in.
                computed = jax.tree.map(lambda leaf: leaf.astype(self.settings.dtype), params)
                return self._loss(computed, part, key, *further)

            value, gradients = jax.value_and_grad(loss)(params)
            if self.mesh is not None:  # each device keeps its share
                where = places(self.mesh, params, self.rules)
                gradients = jax.lax.with_sharding_constraint(gradients, where)
            return value, gradients

        if parts == 1:
            return of(batch, key)
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)

        def add(total: Any, given: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b / parts, total, of(*given)), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))
        return total


def _statistics(params: Any) -> Any:
    """Which leaves no optimizer may touch."""
    paths = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] in STATISTICS for path in paths})


def _trained(params: Any) -> Any:
    return jax.tree.map(lambda fixed: not fixed, _statistics(params))
