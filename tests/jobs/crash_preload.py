"""Load the model once, in the process from which crash workers are forked."""

from tests.jobs.crash_worker import MODEL
from tests.models.loaded import loaded

loaded(MODEL)
