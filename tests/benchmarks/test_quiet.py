"""What is measured again because other programs worked beside it, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest

from benchmarks.compare import quiet
from benchmarks.compare.quiet import Watch, describe_quiet, measure_in_quiet, wait_in_quiet


@pytest.mark.parametrize(
    ("foreign_cores", "times", "is_void"),
    [
        ([0.0], 1, False),
        ([0.5, 0.11, 0.1], 3, False),
        ([None], 1, False),  # nothing is known
        ([0.5, 0.5, 0.5, 0.0], 4, False),
        ([0.5, 0.5, 0.5, 0.2], 4, True),
    ],
)
async def test_a_void_measurement_is_repeated_three_times_at_most(
    foreign_cores: Sequence[float | None], times: int, is_void: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure() -> int:
        measured.append("now")
        return len(measured)

    async def measure_later() -> int:
        return measure()

    for run in (lambda: _done(measure_in_quiet(measure)), lambda: wait_in_quiet(measure_later)):
        measured.clear()
        monkeypatch.setattr(quiet, "watching", disturbed_by(iter(foreign_cores)))
        last, watch = await run()
        assert last == len(measured) == times
        assert describe_quiet([watch]) == {"is_void": is_void, "foreign_cores": [foreign_cores[-1]]}


def disturbed_by(foreign_cores: Iterator[float | None]) -> Callable[[Watch], AbstractContextManager[None]]:
    @contextmanager
    def watching(watch: Watch) -> Iterator[None]:
        yield
        watch.foreign_cores = next(foreign_cores)

    return watching


async def _done(result: tuple[int, Watch]) -> tuple[int, Watch]:
    return result


def test_what_a_failed_measurement_raises_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        measure_in_quiet(lambda: 1 // 0)
