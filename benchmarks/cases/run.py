"""The case `run`: our server against what people would run instead, on one list of arrivals.

By default all sides are models of one server of ours, started for this; with `engine_only` they run in this process,
without Ray and HTTP. With `url` any running server of the five systems is a side, alone or beside those in `against`.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases.engine import resolve_model
from benchmarks.compare.asking import Asker, InProcess
from benchmarks.compare.outputs import LARGEST_DIFFERENCE
from benchmarks.compare.pieces import Pieces, measuring_into
from benchmarks.compare.run import Run, RunOptions
from benchmarks.report import hash_sources
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import SIDES, open_side
from benchmarks.workload import MIXES
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import ModelEntry, describe_entry

URL_SIDE = "url"
DIALECT_NAMES = ("sa3", "saos", "vllm", "aiml", "fal")  # of compare.dialects, which needs more packages
_ADDRESS = re.compile(r"https?://[^/?#\s]+/?")
_IN_FLIGHT = 4096
_API = {"max_steps": 1000, "max_duration_s": 600.0}
_FULL, _SHORT = (300, 6), (60, 0)  # requests of a round, trials of a bisection


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What is compared. Numbers that are None follow `CaseSettings.full`; after `budget_s` no new piece begins."""

    mix: str
    against: tuple[str, ...] = ()
    url: str | None = None
    dialect: str = "sa3"
    url_model: str | None = None
    url_key: str | None = None
    engine_only: bool = False
    count: int | None = None
    goodput_trials: int | None = None
    goodput_of: tuple[str, ...] | None = None  # these sides only
    budget_s: float = float("inf")

    def __post_init__(self) -> None:
        """Raises ValueError naming what is unknown."""
        if self.mix not in MIXES:
            raise ValueError(f"no mix is called {self.mix!r}; there are {', '.join(MIXES)}")
        unknown = [side for side in self.against if side not in SIDES]
        if unknown:
            raise ValueError(f"no side is called {unknown[0]!r}; there are {', '.join(SIDES)}")
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"a side is named twice: {','.join(self.against)}")
        if self.url is not None and not _ADDRESS.fullmatch(self.url):
            raise ValueError(f"--url {self.url} is no address like http://host:8000")
        if self.url is None and len(self.against) < 2:
            raise ValueError("a comparison needs two sides: --against lock,ours or one of them and --url")

    @property
    def sides(self) -> tuple[str, ...]:
        """The reference first."""
        return (*self.against, URL_SIDE) if self.url else self.against


async def run_comparison(settings: CaseSettings, request: RunRequest, *, folder: Path) -> dict[str, Any]:
    """Measure in `folder`, which keeps the lists and every finished piece.

    Raises VoidError, OutOfTimeError, OtherRunError, SideFailedError.
    """
    entry = resolve_model(settings.model)
    count, goodput_trials = _FULL if settings.full else _SHORT
    options = RunOptions(
        request.mix,
        request.sides,
        max_duration_s=describe_entry(entry).card.max_duration_s,
        count=request.count or count,
        rounds=settings.rounds,
        goodput_trials=goodput_trials if request.goodput_trials is None else request.goodput_trials,
        goodput_of=request.goodput_of or request.sides,
        largest_difference=None if request.url else LARGEST_DIFFERENCE,
    )
    about = {
        "settings": asdict(settings),
        "options": asdict(options),
        "engine_only": request.engine_only,
        "url": request.url,
        "url_model": request.url_model,
        "dialect": request.dialect,
        "sources_sha256": hash_sources(),
    }
    with measuring_into(folder):
        pieces = Pieces(folder, about)
        return await _measure(settings, request, entry=entry, options=options, pieces=pieces)


async def _measure(
    settings: CaseSettings, request: RunRequest, *, entry: ModelEntry, options: RunOptions, pieces: Pieces
) -> dict[str, Any]:
    async with _opened(settings, request, entry=entry) as askers:
        run = Run(
            askers,
            options,
            pieces=pieces,
            is_watched=request.url is None,
            budget_s=request.budget_s,
        )
        return await run.measure()


@contextlib.asynccontextmanager
async def _opened(
    settings: CaseSettings, request: RunRequest, *, entry: ModelEntry
) -> AsyncIterator[Mapping[str, Asker]]:
    """Every side, ready to be asked."""
    async with contextlib.AsyncExitStack() as stack:
        askers: dict[str, Asker] = {}
        if request.against:
            opened = _in_process if request.engine_only else _on_one_server
            askers.update(await stack.enter_async_context(opened(settings, request.against, entry=entry)))
        if request.url:
            from benchmarks.compare.dialects import DIALECTS, OverHttp, open_session

            http = await stack.enter_async_context(open_session(request.url, key=request.url_key))
            askers[URL_SIDE] = OverHttp(http, DIALECTS[request.dialect], model=request.url_model)
        yield askers


@contextlib.asynccontextmanager
async def _in_process(
    settings: CaseSettings, sides: tuple[str, ...], *, entry: ModelEntry
) -> AsyncIterator[Mapping[str, Asker]]:
    """All sides around one loaded model; only one of them is asked at a time."""
    model: DiffusionModel = load_model(entry, device=settings.device)
    options = EngineOptions(mode=settings.mode, torch_threads=settings.threads)  # type: ignore[arg-type]
    opened = {name: open_side(name, model, options=options) for name in sides}
    try:
        yield {name: InProcess(side, model.spec.card) for name, side in opened.items()}
    finally:
        for side in opened.values():
            await side.close()


@contextlib.asynccontextmanager
async def _on_one_server(
    settings: CaseSettings, sides: tuple[str, ...], *, entry: ModelEntry
) -> AsyncIterator[Mapping[str, Asker]]:
    from benchmarks.compare.dialects import OverHttp, StableAudio3, open_session

    with serving_sides(settings, sides, entry=entry) as url:
        async with open_session(url) as http:
            yield {name: OverHttp(http, StableAudio3(), model=name) for name in sides}


@contextlib.contextmanager
def serving_sides(settings: CaseSettings, sides: tuple[str, ...], *, entry: ModelEntry) -> Iterator[str]:
    """All sides as models of one server: they share proxy, ingress and encoders. Gives the server's URL.

    Raises ValueError for a model without a folder.
    """
    from benchmarks.servers.process import running_server, write_config
    from benchmarks.servers.sides import side_models

    if entry.folder is None:
        raise ValueError("the sides are served from a folder: --model FOLDER, or --engine-only")
    models = side_models(
        sides,
        path=entry.folder,
        padding_s=entry.card.default_duration_padding_s,
        threads=settings.threads,
        mode=settings.mode,
    )
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(
            Path(folder),
            entry,
            threads=settings.threads,
            import_path="benchmarks.servers.sides:build",
            models=models,
            default_model=sides[0],
            api=_API,
            ingress={"max_ongoing_requests": _IN_FLIGHT},
        )
        with running_server(config) as server:
            yield server.url


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """One side per row."""
    return [
        {
            "side": side,
            "capacity_rps": median(figures["capacity_rps"]),
            **{f"p95_ms {steps}": latency["p95_ms"] for steps, latency in figures["latency"].items()},
            "goodput_rps": (figures["goodput"] or {}).get("good_rps", ""),
        }
        for side, figures in results["sides"].items()
    ]
