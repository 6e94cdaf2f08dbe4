"""`GET /v1/status`: the state of the whole server, from recent reports.

The route loads no model and waits for none. If a model, Ray Serve's controller or the job database does not answer, the
response shows this.
"""

from __future__ import annotations

import asyncio
import math
from statistics import fmean
from typing import Final

from fastapi import APIRouter

from stable_audio_serve import __version__
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody
from stable_audio_serve.api.operator_routes import schemas
from stable_audio_serve.api.routing import operator_route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.shared_routes.info import JobStoreHealth, describe_ready
from stable_audio_serve.api.shared_routes.server import NAME
from stable_audio_serve.core.catalog import ModelCard, ModelStatus
from stable_audio_serve.core.operations import DrainReport, ModelReport, Operations, ServerReport
from stable_audio_serve.core.settings_sources import least_replicas
from stable_audio_serve.jobs.overview import JobsOverview
from stable_audio_serve.jobs.store.health import StoreHealth

TAG = "Operators"
_MINUTE_S: Final = 60.0
_UNKNOWN = ModelReport(ModelStatus("loading"))


def build_router(service: Service, operations: Operations) -> APIRouter:
    """Return the route of one service. Any key may use it."""
    router = APIRouter(route_class=operator_route_class(render_error, scopes=()), tags=[TAG])

    @router.get("/v1/status", responses=error_responses(ErrorBody, 401, 500, 503))
    async def show_server() -> schemas.ServerStatus:
        """The state of the server: models, replicas, backlogs and jobs, about a second old. The status is 200
        also while the server loads, is busy or drains."""
        report, store, jobs = await asyncio.gather(
            operations.report(), service.jobs.watch.health(), service.jobs.overview.overview()
        )
        return describe(service, report, store=store, jobs=jobs)

    return router


def describe(service: Service, report: ServerReport, *, store: StoreHealth, jobs: JobsOverview) -> schemas.ServerStatus:
    """Return the body of the response to `GET /v1/status`."""
    verdict = describe_ready(service, {name: model.status for name, model in report.models.items()}, job_store=store)
    models = {
        card.name: _describe_model(service, card, report=report.models.get(card.name, _UNKNOWN))
        for card in service.backend.catalog
    }
    return schemas.ServerStatus(
        server=NAME,
        version=__version__,
        status=verdict.status,
        ready=verdict.ready,
        reasons=verdict.reasons,
        draining=describe_drain(report.drain),
        backlog_s=sum(model.backlog_s for model in models.values()),
        models=models,
        jobs=_describe_jobs(jobs, verdict.job_store),
        age_s=report.age_s if math.isfinite(report.age_s) else None,
        reason=report.reason,
    )


def describe_drain(drain: DrainReport) -> schemas.Drain:
    """Return the progress of a drain."""
    return schemas.Drain(state=drain.state, requests=drain.num_requests, jobs=drain.num_jobs)


def _describe_model(service: Service, card: ModelCard, *, report: ModelReport) -> schemas.ServedModel:
    settings, catalog = service.settings, service.backend.catalog
    rows = [replica.rows_per_step for replica in report.replicas if replica.rows_per_step is not None]
    return schemas.ServedModel(
        stage=report.status.stage,
        default=card.name == catalog.default.name,
        kept=report.is_kept,
        min_replicas=least_replicas(card.name, settings, catalog=catalog),
        max_replicas=next((m.replicas.max_replicas for m in settings.models if m.name == card.name), 1),
        states=dict(report.status.states),
        backlog_s=sum(replica.backlog_s or 0.0 for replica in report.replicas),
        rows_per_step=fmean(rows) if rows else None,
        waiting_jobs_s=report.waiting_jobs_s,
        # A report that is older than a minute says nothing about the last minute.
        requests_per_minute=sum(each.requests_per_minute or 0 for each in report.replicas if each.age_s < _MINUTE_S),
        replicas=[schemas.Replica.model_validate(replica, from_attributes=True) for replica in report.replicas],
    )


def _describe_jobs(jobs: JobsOverview, store: JobStoreHealth) -> schemas.Jobs:
    unfinished, counts = jobs.unfinished, jobs.counts
    return schemas.Jobs(
        store=store,
        queued=unfinished and unfinished.num_queued,
        running=unfinished and unfinished.num_running,
        succeeded=None if counts is None else counts.get("succeeded", 0),
        failed=None if counts is None else counts.get("failed", 0),
        cancelled=None if counts is None else counts.get("cancelled", 0),
        dead_letters=unfinished and unfinished.num_dead_letters,
        waited_s=unfinished and unfinished.waited_s,
        age_s=jobs.age_s,
        reason=jobs.reason,
    )
