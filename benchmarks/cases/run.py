"""Compares our server with alternatives, such as a lock around the model, for the same arrivals of requests.

Each compared server is called a side. By default the run starts one server, in which each side is a model. With
`engine_only`, all sides run in this process, without Ray and HTTP. With `url`, a running server with one of the five
supported APIs is one of the sides, either the only one or together with the sides in `against`.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare import LARGEST_DIFFERENCE, Run, RunOptions
from benchmarks.load import Asker, InProcess
from benchmarks.models import CaseSettings, resolve_model, write_adapters
from benchmarks.report import Pieces, hash_sources
from benchmarks.sides.servers import SIDES, open_side
from benchmarks.workload import MIXES
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import ModelEntry, describe_entry

_URL_SIDE = "url"
_ADDRESS = re.compile(r"https?://[^/?#\s]+/?")
_API = {"max_steps": 1000, "max_duration_s": 600.0}
_FULL, _SHORT = (300, 6), (60, 0)  # requests per round, trials per bisection


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to compare, and how many requests to send. If a number is None, `CaseSettings.full` determines it."""

    mix: str = "demo-wide"
    against: tuple[str, ...] | None = None
    url: str | None = None
    dialect: str = "sa3"
    url_model: str | None = None
    url_key: str | None = None
    engine_only: bool = False
    count: int | None = None
    goodput_trials: int | None = None
    goodput_of: tuple[str, ...] | None = None  # servers whose goodput is measured; None: all

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown name of a server, a bad URL, or fewer than two servers."""
        if unknown := [side for side in self.here if side not in SIDES]:
            raise ValueError(f"no side is called {unknown[0]!r}; there are {', '.join(SIDES)}")
        if self.url is not None and not _ADDRESS.fullmatch(self.url):
            raise ValueError(f"--url {self.url} is no address like http://host:8000")
        if MIXES[self.mix].num_adapters and not self.engine_only:
            raise ValueError(f"the mix {self.mix} needs --engine-only: its adapters are files of this process")
        if len(set(self.sides)) < max(len(self.sides), 1 if self.url else 2):
            raise ValueError("a comparison needs two unlike sides: --against lock,ours or one of them and --url")

    @property
    def here(self) -> tuple[str, ...]:
        """The names of the compared servers that the run starts on this machine."""
        if self.against is None:
            return () if self.url else ("lock", "static", "ours")
        return self.against

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of all compared servers. All ratios are relative to the first one."""
        return (*self.here, _URL_SIDE) if self.url else self.here


async def measure(settings: CaseSettings, request: RunRequest, *, folder: Path) -> dict[str, Any]:
    """Run the comparison and return its results. Lists of arrivals and finished measurements are stored in `folder`.

    Raises VoidError, OtherRunError or SideFailedError.
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
        warms_up=settings.device != "cpu",
    )
    about = {
        **asdict(settings),
        **asdict(options),
        **{name: getattr(request, name) for name in ("engine_only", "url", "url_model", "dialect")},
        "sources_sha256": hash_sources(),
    }
    pieces = Pieces(folder, about)
    async with _opened(settings, request, entry=entry) as askers:
        return await Run(askers, options, pieces=pieces, is_watched=request.url is None).measure()


@contextlib.asynccontextmanager
async def _opened(
    settings: CaseSettings, request: RunRequest, *, entry: ModelEntry
) -> AsyncIterator[Mapping[str, Asker]]:
    async with contextlib.AsyncExitStack() as stack:
        askers: dict[str, Asker] = {}
        if request.here:
            opened = _in_process if request.engine_only else _on_one_server
            askers |= await stack.enter_async_context(opened(settings, request, entry=entry))
        if request.url:
            from benchmarks.dialects import OverHttp, open_clients

            clients = await stack.enter_async_context(open_clients(request.url, key=request.url_key))
            askers[_URL_SIDE] = OverHttp(clients, request.dialect, model=request.url_model)
        yield askers


@contextlib.asynccontextmanager
async def _in_process(
    settings: CaseSettings, request: RunRequest, *, entry: ModelEntry
) -> AsyncIterator[Mapping[str, Asker]]:
    """Open the compared servers in this process, and yield a client for each.

    The servers share one loaded model, so only one of them may get requests at a time.
    """
    model = load_model(entry, device=settings.device)
    options = EngineOptions(mode=settings.mode, torch_threads=settings.threads)
    opened = {name: open_side(name, model, options=options) for name in request.here}
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model, Path(folder), count=MIXES[request.mix].num_adapters)
        try:
            yield {name: InProcess(side, adapters) for name, side in opened.items()}
        finally:
            for side in opened.values():
                await side.close()


def _on_one_server(
    settings: CaseSettings, request: RunRequest, *, entry: ModelEntry
) -> contextlib.AbstractAsyncContextManager[Mapping[str, Asker]]:
    """Start one server that has each of the compared servers as a model, and yield a client for each.

    The compared servers share the HTTP proxy, the ingress and the audio encoders. Raises ValueError for a model without
    a folder.
    """
    from benchmarks.servers.process import serving

    if entry.folder is None:
        raise ValueError("the sides are served from a folder: --model FOLDER, or --engine-only")
    own = {"duration_padding_s": entry.card.default_duration_padding_s}
    models = {
        side: {**own, "mode": side.removeprefix("ours-") if side.startswith("ours-") else settings.mode}
        for side in request.here
    }
    return serving(
        entry,
        models,
        threads=settings.threads,
        device=settings.device,
        import_path="benchmarks.servers.sides:build",
        default_model=request.here[0],
        api=_API,
    )


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each compared server.

    In brackets: the ratio to the first server, and the range of this ratio over all rounds.
    """
    reference = results["reference"]
    steps = [name for name in results["sides"][reference]["latency"] if name != "all"]
    table = []
    for name, side in results["sides"].items():
        ratios = results["ratios"][name].get(reference, {})
        latency, goodput = side["latency"], side["goodput"]
        table.append(
            {
                "side": name,
                "capacity (1/s)": _cell(median(side["capacity_rps"]), ratios.get("capacity")),
                "p50 (ms)": _cell(latency["all"]["p50_ms"], ratios.get("p50")) if latency else "",
                "p95 (ms)": _cell(latency["all"]["p95_ms"], ratios.get("p95")) if latency else "",
                **{
                    f"p95, {n} steps (ms)": _cell(latency[n]["p95_ms"], ratios.get(f"p95_{n}")) if n in latency else ""
                    for n in (steps if len(steps) > 1 else ())
                },
                "goodput (1/s)": _goodput_cell(goodput, ratios.get("goodput")) if goodput else "",
                "refused": sum(side["refused_at_once"]) + side["refused"],
            }
        )
    return table


def _goodput_cell(bracket: Mapping[str, float | None], ratio: Mapping[str, float] | None) -> str:
    good_rps, bad_rps = bracket["good_rps"], bracket["bad_rps"]
    if good_rps is None:
        return f"below {bad_rps:.2f}"
    return _cell(good_rps, ratio) if bad_rps is not None else f"above {good_rps:.2f}"


def _cell(value: float, ratio: Mapping[str, float] | None) -> str:
    text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{text} ({ratio['value']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else text
