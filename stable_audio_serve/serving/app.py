"""The Ray Serve application: the HTTP deployment (ingress), the job runners and one deployment per model.

The `import_path` in serve_config.yaml names the function `build`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.api.middleware.key_ring import check_key_file
from stable_audio_serve.core.errors import StableAudioError, StorageError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.jobs.open import open_queue, prepare_stores
from stable_audio_serve.jobs.store.loaded_adapters import AdapterStore
from stable_audio_serve.jobs.store.operator_settings import OperatorSettings
from stable_audio_serve.serving import ray_internals
from stable_audio_serve.serving.adapters import Library
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.cores import yield_to_engines
from stable_audio_serve.serving.haproxy import address_header
from stable_audio_serve.serving.job_runner import JobRunnerReplica, RunnerWaker
from stable_audio_serve.serving.logs import configure_logging
from stable_audio_serve.serving.metrics import RayMetrics
from stable_audio_serve.serving.operations import DrainProgress, RayOperations, open_operator_store
from stable_audio_serve.serving.placement import (
    INGRESS_NAME,
    Plan,
    describe_models,
    ingress_options,
    model_options,
    plan_deployments,
    require_shared_database,
    runner_options,
)
from stable_audio_serve.serving.preflight import check_proxy, fetch_configs, require_weights
from stable_audio_serve.serving.replica import ModelReplica
from stable_audio_serve.serving.reservations import check_gpu_shares, decide_surge, node_slots

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# Seconds between checks whether Ray Serve is stopping this replica. If it is, the replica closes its event streams.
_POLL_S = 0.5


@serve.ingress()
class Ingress:
    """The HTTP deployment. Each replica builds its own ASGI application, which calls the models through `handles`."""

    def __init__(  # noqa: PLR0917 - Ray passes the bound arguments in this order
        self,
        plan: Plan,
        handles: Mapping[str, DeploymentHandle],
        runner: DeploymentHandle,
    ) -> None:
        yield_to_engines()
        configure_logging(plan.settings.log_level)
        application = serve.get_replica_context().app_name
        self._settings = plan.settings
        self._metrics = RayMetrics()
        self._backend = RayBackend(plan.catalog, handles, application=application, metrics=self._metrics)
        # The handle of this deployment itself, which Ray Serve cannot pass as an argument. The check that the
        # deployment exists is skipped: it would block, because the deployment does not exist yet.
        ingress = serve.get_deployment_handle(INGRESS_NAME, application, _check_exists=False)
        self._jobs = open_queue(
            plan.settings,
            identity=plan.store_identity,
            catalog=plan.catalog,
            wake=RunnerWaker(runner).wake,
            metrics=self._metrics,
        )
        store = self._jobs.store
        self._operator_store = open_operator_store(store.database, application)
        self._adapters = Library(plan.settings, plan.catalog, store=AdapterStore(store.database, application))
        self._operations = RayOperations(
            self._backend, jobs=store, settings=self._operator_store, ingress=ingress, runner=runner
        )

    def __serve_build_asgi_app__(self) -> Any:  # Ray Serve calls a method of this name
        app = create_app(
            self._backend,
            self._settings,
            jobs=self._jobs,
            metrics=self._metrics,
            operations=self._operations,
            adapters=self._adapters,
            address_header=address_header(os.environ),
        )
        app.add_middleware(_LeaveRequestIdToServe)
        self._draining: Draining = app.state.draining
        # If the database does not answer now, `follow` below reads the settings later.
        with suppress(StorageError):
            self._follow_operators(self._operator_store.read())
        self._adapters.start()
        loop = asyncio.get_running_loop()
        work = (
            self._leave_when_replaced(),
            self._operator_store.follow(self._follow_operators),
            self._adapters.follow(),
        )
        self._tasks = [loop.create_task(each) for each in work]
        return app

    async def drain(self) -> int:
        """Refuse new requests from now on, because the server is stopping.

        Returns the number of requests in flight, or 1 if there are none but the server may not exit yet.
        """
        self._draining.stop()
        return self._draining.num_in_flight or int(not self._draining.may_exit)

    async def drain_progress(self) -> DrainProgress:
        """Return whether this replica is draining, and how many requests it still has to finish."""
        return DrainProgress(self._draining.is_draining, self._draining.num_left)

    def _follow_operators(self, settings: OperatorSettings) -> None:
        if settings.is_drained:
            self._draining.drain()
        else:
            self._draining.resume()

    async def _leave_when_replaced(self) -> None:
        while not ray_internals.is_replica_stopping():  # noqa: ASYNC110  # Ray Serve has no event to wait for
            await asyncio.sleep(_POLL_S)
        self._draining.leave()

    async def __del__(self) -> None:  # Ray Serve calls this when it stops the replica
        for task in getattr(self, "_tasks", ()):  # `_tasks` is missing if the start failed
            task.cancel()


class _LeaveRequestIdToServe:
    """ASGI middleware that removes the header X-Request-Id from responses, because Ray Serve adds it once more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)


def build(args: Settings | Mapping[str, Any]) -> serve.Application:
    """Build the application from the settings in `args`. Values in `.env` and the environment override them.

    Every error is raised as RayServeException with a message of one sentence. For other exceptions, Ray Serve would
    print a traceback.
    """
    try:
        return assemble(args, replica=ModelReplica)
    except StableAudioError as error:
        raise RayServeException(error.message) from error


def assemble(
    args: Settings | Mapping[str, Any], *, replica: type, by_name: Mapping[str, type] = MappingProxyType({})
) -> serve.Application:
    """Build the application.

    `replica` is the class of the models' replicas. `by_name` has other classes for single models, by the model's name.
    Raises ConfigError, CheckpointError.
    """
    ray_internals.require()
    plan = plan_deployments(load_settings(args))
    check_key_file(plan.settings.api.key_file)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    require_shared_database(plan.settings, num_nodes=num_nodes)
    check_proxy(plan.settings, os.environ, print_error=logger.warning)
    # On a cluster, check here only models whose weights are in a configured folder: all nodes have the same folders.
    # The nodes' download caches and their access to the Hugging Face hub can differ.
    checked = [model for model in plan.settings.models if model.path is not None or num_nodes == 1]
    require_weights(plan, checked, print_error=logger.warning)
    others = [model for model in plan.settings.models if model not in checked]
    fetch_configs(plan, others, print_error=logger.warning)
    plan = describe_models(plan)
    stores = prepare_stores(plan.settings)
    logger.info(stores.description)
    plan = replace(plan, store_identity=stores.identity)
    cluster_gpus = ray.cluster_resources().get("GPU", 0.0)
    check_gpu_shares(plan.settings, cluster_gpus=cluster_gpus)
    nodes = node_slots(ray.nodes())
    plan = replace(plan, settings=decide_surge(plan.settings, nodes, cluster_gpus=cluster_gpus))
    models = {
        model.name: _bind(
            by_name.get(model.name, replica),
            model_options(plan, model, cluster_gpus=cluster_gpus),
            plan.settings,
            model,
        )
        for model in plan.settings.models
    }
    runner = _bind(JobRunnerReplica, runner_options(plan.settings, nodes), plan, models)
    return _bind(Ingress, ingress_options(plan.settings, nodes), plan, models, runner)


def _bind(deployed: type, options: Mapping[str, Any], *args: object) -> serve.Application:
    return serve.deployment(deployed).options(**options).bind(*args)
