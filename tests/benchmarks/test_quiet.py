"""What is measured again because other programs worked beside it, and how often."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest

from benchmarks.compare import quiet
from benchmarks.compare.quiet import OwnTime, Watch, describe_quiet, measure_in_quiet, wait_in_quiet


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


_CHILD = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
_PARENT = f"""
import signal, subprocess, sys
signal.signal(signal.SIGCHLD, getattr(signal, sys.argv[1]))
with subprocess.Popen([sys.executable, "-c", {_CHILD!r}], stdin=subprocess.PIPE, text=True) as child:
    input()
    child.communicate("\\n")
print(flush=True)
input()
"""


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])  # as Ray does it: nobody waits for the child
def test_what_an_ended_child_of_a_child_used_is_counted_once(handler: str) -> None:
    own = OwnTime()
    before_s = own.total_s()
    command = [sys.executable, "-c", _PARENT, handler]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdout.readline()
        while_living_s = own.total_s()
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
        ended_s = own.total_s()
        parent.communicate("\n")
    assert while_living_s - before_s >= 1.0
    assert 0.0 <= ended_s - while_living_s < 0.9
