"""`stable-audio-serve quality`: list, create and remove the reports that new replicas are compared with.

The command needs no running server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from stable_audio_serve.cli.configuration import ConfigOption, load_configured
from stable_audio_serve.cli.messages import plain, plain_errors

if TYPE_CHECKING:
    from stable_audio_serve.core.settings import Settings
    from stable_audio_serve.verification.quality.archive import ReportArchive


def quality(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model of the configuration to check.")] = None,
    *,
    forget: Annotated[
        str | None, typer.Option(metavar="ID", help="Remove this report; the next replica makes a new one.")
    ] = None,
    file: ConfigOption = None,
) -> None:
    """List quality reports, or check a model.

    Without MODEL, list the reports that new replicas are compared with, and the last good weights of each model.

    With MODEL, load the model here and check it like a new replica. If the check passes, the printed report can be used
    for the setting `quality_report`. If the check fails, the exit code is 1.
    """
    import asyncio

    with plain_errors():
        if name is not None and forget is not None:
            raise ValueError("use either MODEL or --forget, not both")
        settings = load_configured(file)
        if forget is not None:
            asyncio.run(_forget(settings, forget))
        elif name is not None:
            asyncio.run(_check(settings, name))
        else:
            asyncio.run(_list(settings))


async def _list(settings: Settings) -> None:
    async with _opened(settings) as archive:
        lines = [await _describe(archive, name) for name in await archive.names()]
    for _, line in sorted(lines):
        typer.echo(plain(line))


async def _describe(archive: ReportArchive, name: str) -> tuple[bool, str]:
    """Return whether an entry is a record of last good weights, which are listed after the reports, and its line.

    The archive may have records of models that the configuration does not name.
    """
    from datetime import UTC, datetime

    from stable_audio_serve.core.errors import QualityReportError
    from stable_audio_serve.verification.quality.report import LastGood

    try:
        found = await archive.entry(name)
    except QualityReportError as error:
        return False, error.message
    if found is None:
        return False, f"{name} was removed"
    if isinstance(found, LastGood):
        return True, f"{name} last good weights of {found.model}: {found.weights[:12]} {found.source}"
    setup, made_at = found.setup, datetime.fromtimestamp(found.made_at, UTC)
    place = f"{setup.device} {setup.dtype} {made_at:%Y-%m-%d %H:%M} {found.source}"
    return False, f"{name} {setup.model} weights {setup.weights[:12]} {place}"


async def _check(settings: Settings, name: str) -> None:
    from contextlib import nullcontext
    from functools import partial

    from stable_audio_serve.core.errors import ConfigError
    from stable_audio_serve.core.metrics import NullMetrics
    from stable_audio_serve.jobs.open import open_artifacts
    from stable_audio_serve.serving.engines import load_engine
    from stable_audio_serve.serving.trial import Trial

    model = next((model for model in settings.models if model.name == name), None)
    if model is None:
        names = ", ".join(model.name for model in settings.models)
        raise ConfigError(f"no model is called {name[:80]!r}; configured: {names}", field="models")

    async def others_answer() -> bool:
        return True  # makes a failed check an error; with False, older weights would be loaded instead

    artifacts = open_artifacts(settings)
    load = partial(load_engine, settings, model)
    trial = Trial(
        settings,
        model,
        artifacts=artifacts,
        load=lambda entry: load(entry=entry),
        others_answer=others_answer,
        stage=lambda _: nullcontext(),
        metrics=NullMetrics(),
    )
    try:
        started = await trial.run()
        await started.engine.close()
    finally:
        await artifacts.close()
    quality = started.quality
    typer.echo(f"{name}: {quality.gate}, quality report {quality.report}, weights {quality.weights}")
    if quality.problem:
        typer.echo(quality.problem, err=True)


async def _forget(settings: Settings, report_id: str) -> None:
    async with _opened(settings) as archive:
        await archive.delete(report_id)
    typer.echo(f"{report_id}: removed")


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[ReportArchive]:
    from stable_audio_serve.jobs.open import open_artifacts
    from stable_audio_serve.verification.quality.archive import ReportArchive

    artifacts = open_artifacts(settings)
    try:
        yield ReportArchive(artifacts)
    finally:
        await artifacts.close()
