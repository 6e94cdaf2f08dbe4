"""Generate the audio of a command: as a job on a server, or with an engine in this process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stable_audio_serve.client import AsyncClient, Client, Job, JobProgress, Result
from stable_audio_serve.core.catalog import OPEN_FAMILY
from stable_audio_serve.core.errors import StableAudioError, UnreachableError

if TYPE_CHECKING:
    from stable_audio_serve.core.catalog import ModelCatalog
    from stable_audio_serve.core.generation import Progress
    from stable_audio_serve.core.settings_api import DialectSettings
    from stable_audio_serve.core.settings_models import LoraSettings, ModelSettings
    from stable_audio_serve.engine import Engine
    from stable_audio_serve.serving.placement import Plan

OnProgress = Callable[[JobProgress], None]
_CANCEL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class SoundRequest:
    """What audio a command must generate. `controls` has optional fields of the request, by their names in the API."""

    kind: Literal["generate", "vary", "inpaint", "loop", "replay"]
    prompt: str = ""
    audio: bytes | None = None
    regions: Sequence[tuple[float, float]] = ()
    controls: Mapping[str, Any] = field(default_factory=dict)
    # The recipe and its source files, only for "replay".
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[bytes] = ()

    @property
    def num_clips(self) -> int:
        """The number of variations that the options ask for. A recipe may have more."""
        lists = (self.controls.get("prompts"), self.controls.get("seeds"))
        return max(self.controls.get("batch_size") or 1, *(len(found or ()) for found in lists))

    def model(self, catalog: ModelCatalog, *, dialects: DialectSettings) -> str:
        """Return the canonical name of the model that this request selects. Raises UnknownModelError."""
        if self.kind == "loop":
            return catalog.choose(dialects.model, family=OPEN_FAMILY).name
        name = self.controls.get("model") or self.recipe.get("model") or catalog.default.name
        return catalog.resolve(str(name)).name

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and keyword arguments of the client's method named `kind`."""
        more: dict[str, Any] = dict(self.controls)
        if self.kind == "loop":
            return [self.prompt], {"audio": self.audio, **more}
        if self.kind == "replay":
            return [self.recipe], {"sources": self.sources}
        if self.kind == "inpaint":
            more["regions"] = self.regions or None
        return ([self.prompt] if self.audio is None else [self.audio, self.prompt]), more


def make_by_server(
    request: SoundRequest,
    client: Client,
    *,
    connect: Callable[..., AbstractContextManager[Client]],
    on_progress: OnProgress,
) -> Result:
    """Generate the audio as a job on a server. Ctrl-C cancels the job, with another client from `connect`.

    Loops and replays are not jobs but synchronous requests. Raises errors of `core.errors`.
    """
    arguments, more = request.arguments()
    if request.kind in ("loop", "replay"):
        return getattr(client, request.kind)(*arguments, **more)
    key, job = uuid.uuid4().hex, None
    try:
        job = submit(request, client, key=key)
        return client.jobs.fetch(client.jobs.wait(job.id, on_progress=on_progress))
    except UnreachableError as error:
        if job is not None:
            error.message += f"; the job is not cancelled: `stable-audio-serve jobs fetch {job.id}` gets its audio"
        raise
    except KeyboardInterrupt:
        # The job has already ended, or the server does not answer, for which nobody waits who has pressed Ctrl-C.
        with suppress(StableAudioError), connect(quiet=True, most_retries=0, timeout_s=_CANCEL_TIMEOUT_S) as quick:
            # The response with the job's id may not have arrived. Submitting again with its key returns the same job.
            job = job or submit(request, quick, key=key)
            quick.jobs.cancel(job.id)
        raise


def submit(request: SoundRequest, client: Client, *, key: str | None) -> Job:
    """Submit a request of the kind generate, vary or inpaint as a job. Calls with the same `key` return the same job.

    Raises errors of `core.errors`.
    """
    arguments, more = request.arguments()
    jobs = client.jobs
    submits: dict[str, Callable[..., Job]] = {
        "generate": jobs.submit,
        "vary": jobs.submit_variation,
        "inpaint": jobs.submit_inpaint,
    }
    return submits[request.kind](*arguments, idempotency_key=key, **more)


def make_here(request: SoundRequest, *, config: Path | None, quiet: bool, on_progress: OnProgress) -> Result:
    """Generate the audio in this process, with the server's application and an engine for the requested model.

    Raises errors of `core.errors`.
    """
    import asyncio

    from stable_audio_serve.cli.configuration import load_configured
    from stable_audio_serve.serving.engines import load_named_engine
    from stable_audio_serve.serving.logs import configure_logging
    from stable_audio_serve.serving.placement import plan_deployments

    if request.controls.get("sections") or request.recipe.get("sections"):
        raise ValueError("--local cannot make pieces with sections, which need the job queue of a server")

    settings = load_configured(config, quiet=quiet)
    configure_logging("warning")  # log to standard error, because standard output may be the audio or JSON
    plan = plan_deployments(settings)
    name = request.model(plan.catalog, dialects=settings.dialects)
    (model,) = (model for model in plan.settings.models if plan.catalog.resolve(model.name).name == name)
    # Loading the model would also measure its speed. For a single request, this takes longer than it saves.
    engine_settings = model.engine.model_copy(update={"warmup_budget_s": 0.0})
    request, files = _name_files(request, taken=model.loras)
    model = model.model_copy(update={"engine": engine_settings, "loras": {**model.loras, **files}})
    on_progress(JobProgress("loading", 0.0, None, None))
    engine = load_named_engine(plan.settings, model)  # in an event loop, Ctrl-C would wait for the end of this
    return asyncio.run(_make_here(request, plan, model=model, engine=engine, on_progress=on_progress))


async def _make_here(
    request: SoundRequest, plan: Plan, *, model: ModelSettings, engine: Engine, on_progress: OnProgress
) -> Result:
    import tempfile

    import httpx

    from stable_audio_serve.api.app import create_app
    from stable_audio_serve.core.settings import Settings
    from stable_audio_serve.serving.adapters import Library
    from stable_audio_serve.serving.local import LocalBackend

    def report(progress: Progress) -> None:
        on_progress(JobProgress(progress.stage, progress.fraction, None, progress.queue_position))

    settings, name = plan.settings, plan.catalog.resolve(model.name).name
    arguments, more = request.arguments()
    with tempfile.TemporaryDirectory() as folder:
        open_to_us = settings.api.model_copy(update={"key_hashes": (), "key_file": None})
        alone = Settings(output_dir=folder, api=open_to_us, audio=settings.audio, dialects=settings.dialects)
        async with LocalBackend(plan.catalog, {name: engine}, on_progress=report) as backend:
            adapters = Library(settings.model_copy(update={"models": (model,)}), plan.catalog)
            await adapters.refresh()
            app = create_app(backend, alone, adapters=adapters)
            http = httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=None)
            async with AsyncClient("http://localhost", http=http) as client:
                return await getattr(client, request.kind)(*arguments, **more)


def _name_files(request: SoundRequest, *, taken: Collection[str]) -> tuple[SoundRequest, dict[str, LoraSettings]]:
    """Replace paths of adapter files in the request by names. Return the new request, and the files by these names.

    An adapter's name is a path if it ends with .safetensors. Names in `taken` belong to other adapters.
    """
    from stable_audio_serve.core.settings_models import LoraSettings

    loras = [dict(lora) for lora in request.controls.get("loras", ())]
    files: dict[str, LoraSettings] = {}
    for lora in loras:
        path = Path(lora["name"])
        if path.suffix == ".safetensors":
            file = LoraSettings(path=str(path.absolute()))
            names = (path.stem if number == 1 else f"{path.stem}-{number}" for number in count(1))
            name = next(name for name in names if name not in taken and files.get(name, file) == file)
            lora["name"], files[name] = name, file
    return (replace(request, controls={**request.controls, "loras": loras}) if files else request), files
