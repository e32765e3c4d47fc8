"""Batch jobs: files of prompts -> shards of pictures (rows.py -> tasks.py -> runner.py -> output.py)."""

from kandinsky_jax.batch.job import Job, JobError, open_job
from kandinsky_jax.batch.runner import Report, run
from kandinsky_jax.parallel.process import Process, this_process

__all__ = ["Job", "JobError", "Process", "Report", "open_job", "run", "this_process"]
