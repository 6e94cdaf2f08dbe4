"""A Ray cluster with Ray Serve, without HTTP. All tests of this folder share it and run in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray import serve

# After this time without requests, Ray Serve asks replicas for their queue lengths again. Then the first requests of a
# burst may go to other replicas than the ones that our router has chosen. The tests must cover this case without
# waiting for the default of 10 s.
_QUEUE_CACHE_S = 0.1
_QUEUE_TIMEOUT_S = 10.0  # how long Serve waits for a queue length; the default, 0.1 s, is too short on a busy machine


@pytest.fixture(scope="package")
def running_serve() -> Iterator[None]:
    """Start Ray and Ray Serve. Each test deploys its own application, with its own name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S", str(_QUEUE_CACHE_S))
        for name in ("QUEUE_LENGTH_RESPONSE_DEADLINE_S", "MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"):
            patch.setenv(f"RAY_SERVE_{name}", str(_QUEUE_TIMEOUT_S))
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()
