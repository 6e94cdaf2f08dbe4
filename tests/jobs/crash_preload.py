"""Imported by the process from which crash workers are forked, so that the model is loaded only once."""

from tests.jobs.crash_worker import MODEL
from tests.models.loaded import loaded

loaded(MODEL)
