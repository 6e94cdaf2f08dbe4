"""Imported by the process that workers are forked from: the model is loaded here, once."""

from tests.jobs.crash_worker import MODEL
from tests.models.loaded import loaded

loaded(MODEL)
