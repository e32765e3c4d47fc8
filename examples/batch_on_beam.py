"""A batch job on Apache Beam: python examples/batch_on_beam.py prompts.txt OUTPUT --model tiny --runner DirectRunner

Beam's own arguments (--runner DataflowRunner, --project ...) are passed on. Elements are numbers of shards. A shard is
complete or absent, and its bytes do not depend on its worker: what Beam runs twice is written once.
"""

import argparse

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from kandinsky_jax import batch
from kandinsky_jax.common import terminal


class Generate(beam.DoFn):
    def __init__(self, job):
        self.job, self.shared = job, Shared()

    def setup(self):  # one pipeline in a process, whatever its number of threads
        self.opened = batch.open_job(self.job)
        self.pipe = self.shared.acquire(lambda: batch.load_pipeline(self.opened))

    def process(self, shard):
        report = batch.run(self.opened, self.pipe, shards=[shard], quiet=True)
        beam.metrics.Metrics.counter("kandinsky", "images").inc(report.images)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("rows", help="URL of the file of prompts; a path, where all workers see it")
    parser.add_argument("output", help="URL or path of the folder to fill")
    parser.add_argument("--model", help="folder, URL or repository; the official one if it is not given")
    parser.add_argument("--rows-per-shard", type=int, default=256)
    args, others = parser.parse_known_args()
    job = batch.open_job(batch.Job(args.rows, args.output, model=args.model, rows_per_shard=args.rows_per_shard))
    job.begin()
    with beam.Pipeline(options=PipelineOptions(others)) as pipeline:
        shards = pipeline | beam.Create(job.incomplete()) | beam.Reshuffle()
        shards | beam.ParDo(Generate(job.job))
    report = batch.finish(job)
    print(f"{job.shards} shards, complete: {report.complete}, failed rows: {report.failed}")


if __name__ == "__main__":
    terminal.run(main)
