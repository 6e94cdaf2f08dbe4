"""A server for fuzz tests, in a thread of the test process, and changes that make generated requests meaningful."""

from __future__ import annotations

import asyncio
import json
import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
import schemathesis

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from tests.api.compat.serving import serve_app
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend, make_catalog
from tests.patience import PATIENCE_S

RATE_HZ = 8000  # a low rate keeps the files of long clips small
MAX_DURATION_S = 31.0  # more than the 30 s that a request to fal has by default


def _make_catalog() -> ModelCatalog:
    return ModelCatalog(
        replace(card, max_duration_s=MAX_DURATION_S, sample_rate_hz=RATE_HZ, is_demo=False) for card in make_catalog()
    )


@dataclass
class LowRateBackend(ToneBackend):
    catalog: ModelCatalog = field(default_factory=_make_catalog)

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        t = np.arange(max(int(request.duration_s * RATE_HZ), 1)) / RATE_HZ
        seeds = tuple(request.seed + i for i in range(request.batch_size))
        audio = tuple(
            np.tile(0.5 * np.sin(2 * np.pi * (100 + seed % 1000) * t), (2, 1)).astype(np.float32) for seed in seeds
        )
        return GenerationResult(audio, RATE_HZ, model, seeds)


@contextmanager
def run_server(riff_dir: Path) -> Iterator[str]:
    """Run a server with one riff file in `riff_dir`. Yields its base URL."""
    (riff_dir / "gsharp_120bpm_4.wav").write_bytes(make_audio_file(duration_s=8, rate_hz=RATE_HZ))
    settings = {"jobs": {"max_queued": 1_000_000}, "dialects": {"riff_dir": str(riff_dir)}}
    started: queue.Queue[tuple[int, Callable[[], object]]] = queue.Queue()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serve_app(LowRateBackend(), **settings) as (port, _):
            started.put((port, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, stop = started.get(timeout=PATIENCE_S)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop()
        thread.join()


@dataclass(frozen=True)
class Known:
    """Ids of existing jobs and uploads. Keys are the names of the path and query parameters that take such an id."""

    ids: dict[str, str]

    @classmethod
    def make(cls, url: str) -> Known:
        """Create a job of each API, and an upload, on the server. Returns their ids."""
        fal = _post(f"{url}/queue/fal-ai/stable-audio", {"prompt": "rain", "seconds_total": 1})
        aiml = _post(f"{url}/v2/generate/audio", {"model": "stable-audio", "prompt": "rain", "seconds_total": 1})
        form = {"prompt": "rain", "duration": "1"}
        stability = requests.post(f"{url}/v2beta/audio/stable-audio/text-to-audio", data=form, timeout=PATIENCE_S)
        job = _post(f"{url}/jobs", {"prompt": "rain", "duration": 1})
        upload = _post(f"{url}/storage/upload/initiate", {"file_name": "a.bin"})
        file_id, file_name = upload["file_url"].split("/")[-2:]
        return cls(
            {
                "request_id": fal["request_id"],
                "generation_id": aiml["id"],
                "job_id": job["id"],
                "id": stability.json()["id"],
                "cursor": job["id"],
                "ticket": upload["upload_url"].split("/")[-1],
                "file_id": file_id,
                "file_name": file_name,
                "endpoint_id": "fal-ai/stable-audio",
            }
        )


def make_meaningful(case: schemathesis.Case, known: Known) -> None:
    """Change a request that fits the schema so that it also meets rules that no schema can express."""
    (case.query or {}).pop("fal_webhook", None)
    if case.query and case.query.get("follow"):
        case.query.pop("section", None)
    for parameters in (case.path_parameters, case.query):
        for name in parameters or ():
            if name in known.ids and not _wants_other_ids(case):
                parameters[name] = known.ids[name]
    if case.path.startswith("/storage/upload/{ticket}") and case.method == "PUT":
        case.body = b"the same each time"
    if not isinstance(case.body, dict):
        return
    if case.path == "/v1/audio/replay":
        case.body = case.body if "made_on" in case.body else {"recipe": _RECIPE}
        for name in case.body.keys() & _SOURCES:
            del case.body[name]
        if "seed" in case.body:
            case.body["seed"] = min(int(case.body["seed"]), 2**63 - 1)
        if case.body.get("peaks") == "full":
            case.body["response_format"] = "wav"
    for name, value in list(case.body.items()):
        if name in _DROPPED:
            del case.body[name]
        elif name in _MEANINGFUL:
            case.body[name] = _MEANINGFUL[name]
        elif name in _AT_MOST and isinstance(value, int | float):
            case.body[name] = min(value, _AT_MOST[name])
            if name == "steps":  # JSON Schema accepts 8.0 as an integer, the Open Small dialect does not
                case.body[name] = int(case.body[name])
    if "audio" in case.body and "sampler_kwargs" in case.body:
        case.body["sampler_kwargs"] = '{"scale_phi": 0.5}'
    if case.body.get("model_type") == "finetune":
        case.body["finetune_repo"] = "medium"
    if "v2beta" in case.path:
        for name, (lowest, highest, chosen) in _STABILITY.items():
            value = case.body.get(name, lowest)
            if isinstance(value, int | float) and lowest <= value <= highest:
                case.body[name] = chosen
        if "audio" in case.body:
            case.body["audio"] = _LONG_WAV
        return
    if "inpaint" in case.path:
        case.body.update(duration=4, inpaint_start_seconds="[1, 2.5]", inpaint_end_seconds="[2, 3]")
    if "/v1/music" in case.path:
        case.body["prompt"] = case.body.get("prompt") or "rain"
        case.body.setdefault("music_length_ms", 3000)  # by default 30 s, whose encoding takes most of the time
    if "loop" not in case.path:
        case.body.pop("bars", None)
    else:
        case.body["prompt"] = "rain at 120 bpm"


def _wants_other_ids(case: schemathesis.Case) -> bool:
    """Whether an existing id would be refused: ended jobs cannot be cancelled, and used ids cannot be chosen again."""
    return case.path.endswith("/cancel") or (case.path.startswith("/jobs/") and case.method in ("DELETE", "PUT"))


def is_lenient(case: schemathesis.Case) -> bool:
    """Whether the case has a value of a wrong type that the API accepts on purpose, such as "5" for a number."""
    return isinstance(case.body, dict) and any(
        isinstance(value, bool) or (isinstance(value, str) and _is_number(value))
        for name, value in case.body.items()
        if name not in ("prompt", "input", "negative_prompt")
    )


_WAV = make_audio_file(duration_s=0.2, rate_hz=RATE_HZ)
_LONG_WAV = make_audio_file(duration_s=6.5, rate_hz=RATE_HZ)
# Number fields of Stability's forms: lowest value, highest value, and a value that is valid with any other fields.
_STABILITY = {"duration": (1, 380, 4), "steps": (4, 100, 8), "mask_start": (0, 380, 1), "mask_end": (0, 380, 2)}
_STABILITY |= {"strength": (0, 1, 0.5)}
_MEANINGFUL: dict[str, Any] = {
    "audio": _WAV,
    "audio_file": _WAV,
    "model": "medium",
    "model_id": "medium",
    "sampler_kwargs": {"scale_phi": 0.5},
    "deadline_s": 60,
    "key": "gsharp",
    "finetune_repo": "medium",
    "audio_start": 0,
    "stream_format": "audio",
}
_RECIPE = json.dumps(
    {
        "recipe": 1,
        "model": "medium",
        "prompt": "rain",
        "duration": 1.0,
        "seed": 1,
        "response_format": "wav",
        "peaks": "limit",
        "made_on": {"device": "cpu", "dtype": "float32"},
    }
)
_SOURCES = {"init_audio", "init_noise_level", "inpaint_audio", "inpaint_regions", "keep", "sampler", "samples"}
_SOURCES |= {"extend_before_s", "sections", "overlap", "loudness", "fade_in_s", "fade_out_s"}
_DROPPED = {
    "finetune_checkpoint",
    "sampler_type",  # depends on the model
    "loras",  # this server has no adapters
    "inpaint_mask_start_seconds",
    "inpaint_mask_end_seconds",  # aliases
    "webhook_url",  # only public addresses are accepted
    *("bitrate", "bit_depth", "sample_rate"),  # depend on the format
    "bpm",  # needs loop and bars
    *("prompts", "seeds", "sections", "overlap_s"),  # depend on each other, and on the number of variations
    *("extend_before_s", "extend_after_s"),  # in place of regions
    *("loudness", "fade_in_s", "fade_out_s"),  # depend on the length of the clip
    *("composition_plan", "finetune_id", "store_for_inpainting"),  # must be unset in music with a prompt
}
_AT_MOST = {
    "duration": 8,
    "duration_seconds": 8,
    "music_length_ms": 8000,
    "steps": 50,
    "batch_size": 2,
    "audio_length": 8,
    "seconds_total": 8,
}


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = requests.post(url, json=body, timeout=PATIENCE_S)
    reply.raise_for_status()
    answer: dict[str, Any] = reply.json()
    return answer


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
