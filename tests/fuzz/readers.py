"""All readers that are fuzzed."""

from tests.fuzz import models

READERS = models.READERS
