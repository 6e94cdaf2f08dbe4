"""For all tests: one thread per process, because parallel maths on shared cores is slower and varies; no time limit per
Hypothesis example, because a busy machine is not a bug.
"""

from __future__ import annotations

import os

from hypothesis import settings

from tests.databases import postgres, postgres_url

__all__ = ["postgres", "postgres_url"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("default", deadline=None)
settings.load_profile("default")
