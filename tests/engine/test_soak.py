"""Many mixed requests and cancellations leave nothing behind in an engine. `make soak` sends 2,000, this test 48."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import pytest
import structlog
from rich.progress import Progress

from benchmarks.cases.memory import growth_share
from tests.engine.soak import CANCEL_SHARE, IN_FLIGHT, Outcome, soak
from tests.patience import PATIENCE_S

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "48"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
SETTLED = 200  # after this many requests all caches are full, so the memory must not grow any more
MOST_GROWTH = 0.02
TENSORS_OF_A_ROW = 64  # a row holds at most so many tensors; most are keys and values of the layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    logged = structlog.get_config()
    # Without the log line of each request.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    before = {thread.name for thread in threading.enumerate()}
    with Progress() as progress:
        bar = progress.add_task("requests", total=REQUESTS)
        outcome = asyncio.run(
            soak(
                num_requests=REQUESTS,
                seed=SEED,
                output_dir=tmp_path_factory.mktemp("outputs"),
                on_done=lambda done: progress.update(bar, completed=done),
            )
        )
    ends_at = time.monotonic() + PATIENCE_S
    while (left := {thread.name for thread in threading.enumerate()} - before) and time.monotonic() < ends_at:
        time.sleep(0.05)
    structlog.configure(**logged)
    assert not left, f"threads that outlive the engine: {left}"
    return outcome


def test_every_result_equals_that_of_the_request_alone(outcome: Outcome) -> None:
    assert not outcome.wrong
    assert outcome.answered.total() + outcome.cancelled.total() == REQUESTS
    assert len(outcome.answered) == 6


def test_one_request_in_twenty_is_cancelled(outcome: Outcome) -> None:
    """The number may be slightly smaller, because a request may finish before its cancellation."""
    drawn = round(CANCEL_SHARE * REQUESTS)
    assert drawn / 2 <= outcome.cancelled.total() <= drawn


def test_the_engine_keeps_nothing_of_finished_requests(outcome: Outcome) -> None:
    """Objects of the last request may remain, because the engine's thread may still refer to them."""
    first, *later = outcome.kept
    for kept in later:
        more = {name: count - first[name] for name, count in kept.items() if count > first[name]}
        assert more.pop("Tensor", 0) <= 2 * TENSORS_OF_A_ROW
        assert all(count <= IN_FLIGHT for count in more.values()), more


def test_memory_does_not_grow(outcome: Outcome) -> None:
    held = [size for done, size in outcome.resident if done >= SETTLED]
    if len(held) < 4:
        pytest.skip("too few requests: `make soak`")
    print(f"resident after {SETTLED} and {REQUESTS} requests: {held[0] / 2**20:.1f} and {held[-1] / 2**20:.1f} MiB")
    assert growth_share(held) <= MOST_GROWTH
