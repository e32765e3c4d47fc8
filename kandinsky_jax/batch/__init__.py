"""Batch jobs: files of prompts -> shards of pictures (rows.py -> requests.py -> runner.py -> shards.py)."""

from kandinsky_jax.batch.job import Job, JobError, OpenJob, open_job
from kandinsky_jax.batch.runner import Report, ShardResult, finish, load_pipeline, run
from kandinsky_jax.parallel.process import Process, this_process

__all__ = [
    "Job",
    "JobError",
    "OpenJob",
    "Process",
    "Report",
    "ShardResult",
    "finish",
    "load_pipeline",
    "open_job",
    "run",
    "this_process",
]
