"""The Ray and its Serve, without HTTP, that all files of this folder share: `make test` gives them to one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray import serve

# After this long without requests Serve asks the replicas for their queues again, and sends a burst's first requests to
# others than were chosen; Serve's own 10 s would make a test wait.
_QUEUES_FORGOTTEN_S = 0.1
_QUEUES_TOLD_S = 10.0  # a busy machine's replicas may take longer than Serve's 0.1 s to tell their queue


@pytest.fixture(scope="package")
def running_serve() -> Iterator[None]:
    """For `serve.run`, under names of applications that differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S", str(_QUEUES_FORGOTTEN_S))
        for name in ("QUEUE_LENGTH_RESPONSE_DEADLINE_S", "MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"):
            patch.setenv(f"RAY_SERVE_{name}", str(_QUEUES_TOLD_S))
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()
