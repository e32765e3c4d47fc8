"""All readers that are fuzzed."""

from tests.fuzz import cli, jobs, lora, models, training

READERS = (*models.READERS, *lora.READERS, *jobs.READERS, *training.READERS, *cli.READERS)
