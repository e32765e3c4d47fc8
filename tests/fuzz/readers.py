"""All readers that are fuzzed."""

from tests.fuzz import jobs, models, training

READERS = (*models.READERS, *jobs.READERS, *training.READERS)
