"""Loads the model. The process from which crash workers are forked imports this module, so it is loaded only once."""

from tests.jobs.crash_worker import MODEL
from tests.models.loaded import loaded

loaded(MODEL)
