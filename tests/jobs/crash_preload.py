"""Loads the model once. A process imports this module, and the crash workers are forked from that process."""

from tests.jobs.crash_worker import MODEL
from tests.models.loaded import loaded

loaded(MODEL)
