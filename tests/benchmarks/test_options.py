"""Everything that a case starts has the options of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import yaml

from benchmarks import cli, models, page
from benchmarks.cases import cold_start, http, run
from benchmarks.cases.run import RunRequest
from benchmarks.goals import GOALS
from benchmarks.models import CaseSettings
from benchmarks.servers import process, sides
from stable_audio_serve import engine
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.serving import engines
from tests.factories import ToyModel


class StartedError(Exception):
    """Raised instead of starting a server."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the applications whose server would have been started."""
    args: list[dict[str, Any]] = []

    def start(config: Path) -> NoReturn:
        args.append(yaml.safe_load(config.read_text())["applications"][0]["args"])
        raise StartedError

    for module in (process, cold_start):
        monkeypatch.setattr(module, "running_server", start)
    return args


@pytest.mark.parametrize("case", ["http", "cold-start", "run"])
async def test_a_started_server_uses_the_device_of_the_case(
    case: str, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http, "load", lambda _: ToyModel())
    monkeypatch.setattr(cold_start, "_start_bare", lambda _: 1.0)
    settings, request = CaseSettings(device="cpu", rounds=1), RunRequest(against=("lock", "ours"))
    measures = {
        "http": lambda: http.measure(settings),
        "cold-start": lambda: cold_start.measure(settings),
        "run": lambda: run.measure(settings, request, folder=tmp_path),
    }
    with pytest.raises(StartedError):
        await measures[case]()
    assert [args.get("device") for args in started] == ["cpu"]


def test_the_bare_process_of_a_cold_start_has_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int | None] = []

    class IdleEngine:
        """Replaces the engine, and stores its number of threads."""

        def __init__(self, _: object, options: EngineOptions) -> None:
            threads.append(options.torch_threads)

        async def generate(self, _: object) -> None:
            """Generates nothing."""

    def run_here(command: Sequence[str], **_: object) -> None:
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})

    monkeypatch.setattr(models, "load", lambda _: ToyModel())
    monkeypatch.setattr(engine, "Engine", IdleEngine)
    monkeypatch.setattr(cold_start, "subprocess", SimpleNamespace(run=run_here))
    cold_start._start_bare(CaseSettings(threads=2))
    assert threads == [2]


def test_the_pages_name_the_goals_that_make_bench_leaves_out() -> None:
    measured = {*cli._BENCH_CASES, *(f"run-{request.mix}" for request in cli._SHORT_RUNS)}
    left_out = {goal.case for goal in GOALS} - measured
    root = Path(__file__).parents[2]
    for text in ((root / "benchmarks" / "README.md").read_text(), str(cli.__doc__), page.PAGES[0].read_text()):
        assert f"`{'` and `'.join(sorted(left_out, reverse=True))}`" in text


@pytest.mark.parametrize("rounds", ["0", "-1", "two"])
def test_a_case_needs_a_round(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parser().parse_args(["cold-start", "--rounds", rounds])
    assert stopped.value.code == 2
    assert f"--rounds: '{rounds}' is not a whole number above 0" in capsys.readouterr().err


def test_a_compared_server_loads_the_model_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[object] = []

    def load(*_: object, dtype: object = None, **__: object) -> NoReturn:
        dtypes.append(dtype)
        raise StartedError

    settings = Settings.model_validate({"models": [{"name": "lock", "path": "."}], "device": "cpu"})
    for module, open_model in ((sides, sides.SideReplica), (engines, engines.load_engine)):
        monkeypatch.setattr(module, "load_model", load)
        with pytest.raises(StartedError):
            open_model(settings, settings.models[0])
    assert dtypes[0] == dtypes[1]
