"""The training step: gradients of any loss, accumulation, clipping, AdamW, and an average of the weights.

Weights and their average are float32, whatever dtype the networks compute in. The step is a pure function of the state
and a batch, compiled once: `state, metrics = trainer.step(state, batch, key)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.malloc import keep_freed_memory
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.sharding import REPLICATED, Rules
from kandinsky_jax.parallel.stationary import EXCHANGED, FSDP_AXIS, to_gather
from kandinsky_jax.training.distillation import TARGET
from kandinsky_jax.training.mesh import (
    EXAMPLE_AXES,
    EXAMPLES,
    FSDP_MIN_SIZE,
    gather,
    parts,
    put,
    scatter_sums,
    shard_examples,
    state_shardings,
    sum_replicas,
)

# (trained parameters, batch, [frozen], [average of the trained parameters]) -> a float32 scalar
Loss = Callable[..., jax.Array]
# (batch, key) -> batch with random numbers for each example
Draw = Callable[[PyTree, jax.Array], PyTree]

# Parameters that are statistics of the data, which the optimizer must not change.
STATISTICS = ("clip_mean", "clip_std")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings, with the names and defaults of the reference's scripts where these have them.

    Args:
        learning_rate: after the warm-up.
        lr_scheduler: "constant", "linear" or "cosine" (to zero at `max_train_steps`).
        lr_warmup_steps: steps in which the rate rises from zero.
        max_train_steps: the end of the schedule.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon: of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).
        max_grad_norm: largest norm of the gradients; None is no limit.
        gradient_accumulation_steps: parts of a batch that are processed one after the other, to save memory.
        ema_decay: decay of the average of the weights; None keeps no average.
        dtype: in which the networks compute; weights stay float32.
        remat: store only results of matrix products for the backward pass, and recompute the rest.
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
        if self.dtype not in COMPUTE_DTYPES:
            faults.append(f"dtype={shorten(self.dtype, 40)!r} is not supported, only {', '.join(COMPUTE_DTYPES)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            faults.append(f"ema_decay must be between 0 and 1, got {self.ema_decay}")
        if faults:
            raise ValueError("; ".join(faults))

    def rate(self) -> optax.Schedule:
        """Return the learning rate by step."""
        ramp = optax.linear_schedule(0.0, self.learning_rate, self.lr_warmup_steps)
        rest = SCHEDULES[self.lr_scheduler](self.learning_rate, max(1, self.max_train_steps - self.lr_warmup_steps))
        return optax.join_schedules([ramp, rest], [self.lr_warmup_steps]) if self.lr_warmup_steps else rest


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
}


class TrainState(NamedTuple):
    """State of training."""

    step: jax.Array  # int32
    params: PyTree  # trained parameters: of a network, or of its LoRA; float32
    opt_state: PyTree
    ema: PyTree  # as params, or None


class Trainer:
    """Training step of a loss.

    Args:
        loss: (trained parameters, batch) -> a float32 scalar, the mean over the batch's first axis. On a mesh, each
            device computes it for its own examples, in a `shard_map`; `mesh.all_examples` has those of the others.
        settings: of the optimizer.
        frozen: frozen arrays that the loss also needs, such as the weights under a LoRA. They are an argument of the
            compiled program; arrays in a closure would be compiled into it as constants. The loss's third argument.
        mesh: the devices to train on, see `kandinsky_jax.training.mesh`; None is the device of the parameters.
        rules, min_size: sharding of trained parameters over the mesh's `fsdp`, see
            `kandinsky_jax.training.mesh.state_shardings`.
        draw: (batch, key) -> batch for the loss, with random numbers for each example; they depend on neither mesh nor
            accumulation. None if the loss has nothing random.
        uses_average: give the loss the average of the weights too, without gradient, as its last argument; it needs
            `settings.ema_decay`.
    """

    def __init__(
        self,
        loss: Loss,
        settings: OptimizerConfig,
        frozen: PyTree = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        min_size: int = FSDP_MIN_SIZE,
        draw: Draw | None = None,
        uses_average: bool = False,
    ):
        self.settings, self.mesh, self.rules, self.min_size = settings, mesh, rules, min_size
        self.frozen = frozen if mesh is None or frozen is None else put(frozen, self.shardings(frozen))
        self._plain_loss, self._draw, self._uses_average = loss, draw, uses_average
        # Equal parts of a batch, of whose losses the mean is taken: of devices, and of accumulation.
        self._parts = parts(mesh) * settings.gradient_accumulation_steps
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        policies = jax.checkpoint_policies
        kept = policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(EXCHANGED, TARGET)
        )
        self._loss = jax.checkpoint(loss, policy=kept) if settings.remat else loss
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

    def shardings(self, tree: PyTree) -> PyTree:
        """Return where the leaves of a state, or of frozen arrays, lie on the mesh."""
        assert self.mesh is not None
        return state_shardings(self.mesh, tree, self.rules, self.min_size)

    def init(self, params: PyTree) -> TrainState:
        """Return the state before the first step; the parameters are copied to float32."""
        if self.mesh is None:
            return self._initial_state(params)
        sharded = put(params, self.shardings(params))
        where = self.shardings(jax.eval_shape(self._initial_state, params))
        return jax.jit(self._initial_state, out_shardings=where)(sharded)

    def _initial_state(self, params: PyTree) -> TrainState:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
        ema = None if self.settings.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), ema)

    def step(self, state: TrainState, batch: PyTree, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Do one step; the arrays of `state` are donated.

        Args:
            state: from `init`, or from the previous step.
            batch: arrays whose first axis is examples; with several processes, those of this one (`local_examples`).
            key: the same for every step and process.
        Returns:
            the next state, and the metrics "loss" and "gradient_norm", float32 scalars.
        """
        return self._program(state, shard_examples(self.mesh, batch), key, self.frozen)

    def lower(self, state: PyTree, batch: PyTree, key: PyTree, frozen: PyTree = None) -> jax.stages.Lowered:
        """Lower the step's program for these shapes and shardings, to analyse its cost."""
        return self._program.lower(state, batch, key, frozen)

    def _step(
        self, state: TrainState, batch: PyTree, key: jax.Array, frozen: PyTree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        further = () if frozen is None else (frozen,)
        further += (self._computed(state.ema),) if self._uses_average else ()
        loss, gradients = self._gradients(state.params, batch, jax.random.fold_in(key, state.step), further)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.settings.ema_decay is not None:
            # As diffusers' EMAModel: a smaller decay in the first steps.
            decay = jnp.minimum(self.settings.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        # A step whose loss is not finite changes only the step number, so that one bad picture spoils no weights.
        fine = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
        done = TrainState(state.step + 1, *kept)
        if self.mesh is not None:
            done = jax.lax.with_sharding_constraint(done, self.shardings(done))
        return done, metrics

    def _gradients(
        self, params: PyTree, batch: PyTree, key: jax.Array, further: tuple[PyTree, ...]
    ) -> tuple[jax.Array, PyTree]:
        """Return the loss of a batch, and its gradients by the float32 parameters.

        Args:
            further: arguments of the loss: frozen arrays, and the average of the parameters.
        """
        batch = batch if self._draw is None else self._draw(batch, key)
        if self.mesh is None:
            return self._accumulated(batch, params, self._computed(params), further)
        specs = [jax.tree.map(lambda where: where.spec, self.shardings(tree)) for tree in (params, *further)]
        moved = self._to_gather(params, specs[0], batch, further)

        def of_device(batch: PyTree, params: PyTree, *further: PyTree) -> tuple[jax.Array, PyTree]:
            computed = gather(self._computed(params), moved)
            whole = tuple(gather(tree, spec) for tree, spec in zip(further, specs[1:], strict=True))
            loss, shards = self._accumulated(batch, params, computed, whole, lambda sums: scatter_sums(sums, moved))
            sums = sum_replicas(self._computed(shards), specs[0])
            return jax.lax.psum(loss, EXAMPLE_AXES), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), sums)

        mapped = jax.shard_map(
            of_device, mesh=self.mesh, in_specs=(EXAMPLES, *specs), out_specs=(REPLICATED, specs[0]), check_vma=False
        )
        return mapped(jax.tree.map(self._by_device, batch), params, *further)

    def _to_gather(self, params: PyTree, specs: PyTree, batch: PyTree, further: tuple[PyTree, ...]) -> PyTree:
        """Return `specs` of the parameters that are gathered, see `parallel.stationary`."""
        assert self.mesh is not None
        if (shards := self.mesh.shape[FSDP_AXIS]) == 1:
            return specs
        part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) // self._parts, *x.shape[1:]), x.dtype), batch)
        computed = jax.eval_shape(self._computed, params)
        # Not `self._loss`: within `jax.checkpoint` parameters are other objects.
        return to_gather(self._plain_loss, computed, specs, shards, part, *further)

    def _by_device(self, x: jax.Array) -> jax.Array:
        """Reorder examples, so that the devices' parts of accumulation make up those of the batch.

        A loss may compare the examples of a part.
        """
        count = self.settings.gradient_accumulation_steps
        if count == 1:
            return x
        return x.reshape(count, parts(self.mesh), -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def _computed(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(self.settings.dtype), tree)

    def _accumulated(
        self,
        batch: PyTree,
        params: PyTree,
        computed: PyTree,
        further: tuple[PyTree, ...],
        keep: Callable[[PyTree], PyTree] = lambda gradients: gradients,
    ) -> tuple[jax.Array, PyTree]:
        """Return the sum of the losses of a batch's parts, each divided by `self._parts`, and its float32 gradients.

        Args:
            params: float32, as large as what is kept of gradients.
            computed: whole parameters in the dtype of computation.
            keep: what to keep of a part's gradients.
        """

        def of(part: PyTree) -> tuple[jax.Array, PyTree]:
            def loss(computed: PyTree) -> jax.Array:
                return self._loss(computed, part, *further) / self._parts

            value, gradients = jax.value_and_grad(loss)(computed)
            return value, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), keep(gradients))

        count = self.settings.gradient_accumulation_steps
        if count == 1:
            return of(batch)
        split = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None), zeros, split)
        return total


def _statistics(params: PyTree) -> PyTree:
    """Mark the leaves that the optimizer must not change."""
    paths = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] in STATISTICS for path in paths})


def _trained(params: PyTree) -> PyTree:
    return jax.tree.map(lambda fixed: not fixed, _statistics(params))
