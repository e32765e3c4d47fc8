"""Engines deal out a job's shards to workers one by one; without one, each process has a fixed part of them."""

from kandinsky_jax.batch.engines.ray_engine import EngineReport, run_on_ray

__all__ = ["EngineReport", "run_on_ray"]
