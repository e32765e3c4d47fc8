"""A batch job on Ray Data: python examples/batch_on_ray_data.py prompts.txt OUTPUT --model tiny --workers 2

RAY_ADDRESS or `ray job submit` names a cluster; without, Ray starts here. Rows of the dataset are numbers of shards. A
shard is complete or absent, and its bytes do not depend on its worker: what Ray runs twice is written once.
"""

import argparse
import os

if os.environ.setdefault("RAY_ADDRESS", "local") == "local":  # on 127.0.0.1 alone; Ray reads it when it is imported
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
import ray

from kandinsky_jax import batch
from kandinsky_jax.common import terminal


class Generate:
    def __init__(self, job):
        self.job = batch.open_job(job)
        self.pipe = batch.load_pipeline(self.job)

    def __call__(self, rows):
        report = batch.run(self.job, self.pipe, shards=rows["item"].tolist(), quiet=True)
        return rows | {"images": [report.images], "errors": [report.errors], "seconds": [report.seconds]}


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("rows", help="URL of the file of prompts; a path, where all workers see it")
    parser.add_argument("output", help="URL or path of the folder to fill")
    parser.add_argument("--model", help="folder, URL or repository; the official one if it is not given")
    parser.add_argument("--rows-per-shard", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1, help="most processes, each with a pipeline")
    parser.add_argument("--tpus", type=float, default=0, help="chips of each, such as 4")
    args = parser.parse_args()
    job = batch.open_job(batch.Job(args.rows, args.output, model=args.model, rows_per_shard=args.rows_per_shard))
    job.begin()
    if left := job.incomplete():
        pool = ray.data.ActorPoolStrategy(size=args.workers, max_tasks_in_flight_per_actor=1)
        shards = ray.data.from_items(left, override_num_blocks=len(left))
        options = {"batch_size": 1, "compute": pool, "resources": {"TPU": args.tpus} if args.tpus else None}
        for result in shards.map_batches(Generate, fn_constructor_args=[job.job], **options).iter_rows():
            print(result)
    report = batch.finish(job)
    print(f"{job.shards} shards, complete: {report.complete}, failed rows: {report.failed}")


if __name__ == "__main__":
    terminal.run(main)
