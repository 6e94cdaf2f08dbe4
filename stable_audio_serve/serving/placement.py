"""Plan the Ray Serve deployments and their options from the settings.

Imports no torch and needs no running Ray. `reservations` computes the CPUs and GPUs that each replica reserves.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.errors import CheckpointError, ConfigError
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.core.settings_models import LoraSettings
from stable_audio_serve.core.settings_sources import check_model_names, least_replicas, preloaded_names
from stable_audio_serve.jobs.open import check_stores, open_store
from stable_audio_serve.models.adapters.sources import is_remote
from stable_audio_serve.models.registry import DEMO, DEMO_ADAPTERS, ModelEntry, describe_entry, resolve_entry
from stable_audio_serve.serving.reservations import Slot, replica_slot, reserved_cpus

INGRESS_NAME = "Ingress"
RUNNER_NAME = "job-runner"

_MOST_REQUESTS = 512  # Ray Serve's limit for a model's replica; an engine itself accepts far fewer requests
# Ray Serve's limit of concurrent requests for an ingress replica. It is never reached, because a process cannot have
# that many connections. Above the limit, Ray Serve would queue all requests, even /health, and would answer in plain
# text when the queue is full. The application has its own limits.
_NO_LIMIT = 100_000
# Ray Serve would run the application on a thread of its own, and its responses would go through a queue without limit:
# clients that read slowly would fill the memory, and the application's limit of their speed would have no effect.
_ON_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
_ROUTER = "stable_audio_serve.serving.routing:LeastWorkRouter"
_ROUTING_STATS_PERIOD_S = 1.0  # seconds between two reports of a replica's statistics to the routers
_POLICY = "stable_audio_serve.serving.autoscaling:WorkPolicy"
# Ray Serve passes the autoscaling policy the statistics of the last ten seconds, with one value per second, and the
# maximum of the number of concurrent requests. In Ray 2.60, the environment variables for these options have no effect.
_OBSERVATION = {"metrics_interval_s": 1.0, "look_back_period_s": 10.0, "aggregation_function": "max"}
_CONSTRUCTOR_ATTEMPTS = 2  # if a replica fails to start twice, a third attempt would most likely fail too
_ONE_REPLICA = 1  # extra replicas during an update, in percent; Ray Serve rounds 1 % up to one replica
_MOST_PER_NODE = 100  # the largest limit that Ray Serve accepts
_DRAIN_POLL_S = 0.1  # seconds between Ray Serve's checks whether a stopping replica has finished its requests
# The settings for jemalloc are from PyTorch's guide to tuning on CPUs, except the last one. Freed memory of any size is
# kept for the next call. All threads share one arena, so that each can use the memory that another has freed. The last
# setting allows a small block to use a part of a large free block. By default, it may be at most 64 times as large as
# the small one; then 2,000 prompts in turn made the memory of the demo's replica grow from 0.7 to 1.8 GB.
_ALLOCATOR = "oversize_threshold:0,narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:30"
_ALLOCATOR_PAGE_BYTES = 4096  # jemalloc does not work with larger pages than those of the machine that built it


@dataclass(frozen=True, slots=True)
class Plan:
    """The planned deployments. `preloaded` has the canonical names of the models that stay loaded.

    `store_identity` identifies the job database (`jobs.open.PreparedStores`). If it is set, a process refuses to work
    with any other job database.
    """

    settings: Settings
    catalog: ModelCatalog
    preloaded: tuple[str, ...]
    store_identity: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names of the models, in the order of the configuration."""
        return tuple(card.name for card in self.catalog)

    @property
    def least_replicas(self) -> Mapping[str, int]:
        """The smallest number of replicas of each model."""
        return {name: least_replicas(name, self.settings, catalog=self.catalog) for name in self.names}

    @property
    def started(self) -> frozenset[str]:
        """The names of the models that have a replica from the start of the server."""
        return frozenset(name for name, least in self.least_replicas.items() if least)

    @property
    def num_cpus(self) -> int:
        """The number of CPUs with which to start an embedded Ray, so that all replicas fit on this machine."""
        wanted = sum(
            reserved_cpus(model, num_gpus=0) * (model.replicas.max_replicas + bool(model.replicas.surge))
            for model in self.settings.models
        )
        wanted += self.settings.ingress.num_cpus * self.settings.ingress.replicas
        return max(os.cpu_count() or 1, math.ceil(wanted))


def plan_deployments(settings: Settings) -> Plan:
    """Return the plan for these settings. Raises ConfigError for invalid model names, folders or storage settings.

    Reads the models' configs, but none of their other files. A model whose config cannot be read gets the same card as
    a model that is not downloaded yet. `preflight` reports the reason later.
    """
    catalog = _catalog(settings)
    check_model_names(settings, catalog)
    settings = _with_absolute_paths(settings)
    check_stores(settings)
    return Plan(settings, catalog, preloaded_names(settings, catalog))


def _with_absolute_paths(settings: Settings) -> Settings:
    """Return the settings with absolute paths, because the replicas' processes have another working directory."""
    changes: dict[str, Any] = {"output_dir": _absolute(settings.output_dir)}
    if settings.api.key_file is not None:
        changes["api"] = settings.api.model_copy(update={"key_file": _absolute(settings.api.key_file)})
    changes["models"] = tuple(_with_absolute_files(model) for model in settings.models)
    return settings.model_copy(update=changes)


def _with_absolute_files(model: ModelSettings) -> ModelSettings:
    """Return the settings with absolute paths, and with the adapters that the package has for the model."""
    packaged = DEMO_ADAPTERS if model.name == DEMO and model.path is None and model.repo_id is None else {}
    loras = {name: LoraSettings(path=str(path)) for name, path in packaged.items()} | model.loras
    return model.model_copy(
        update={
            "path": model.path and _absolute(model.path),
            "lora_folder": model.lora_folder and _absolute(model.lora_folder),
            "loras": {
                name: one if is_remote(one.path) else one.model_copy(update={"path": _absolute(one.path)})
                for name, one in loras.items()
            },
        }
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def describe_models(plan: Plan) -> Plan:
    """Return the plan with new model cards, made from the configs that are on disk now."""
    return replace(plan, catalog=_catalog(plan.settings))


def require_shared_database(settings: Settings, *, num_nodes: int) -> None:
    """Raise ConfigError if the job database is SQLite and the cluster has several nodes.

    Each node would have its own database file, or the nodes would damage a shared file.
    """
    if num_nodes > 1 and open_store(settings).database.is_sqlite:
        raise ConfigError(
            f"jobs.database_url (STABLE_AUDIO_DATABASE_URL): SQLite serves one machine and this Ray cluster has "
            f"{num_nodes} nodes; set it to a PostgreSQL database, postgresql://user:password@host/database",
            field="jobs.database_url",
        )


def _catalog(settings: Settings) -> ModelCatalog:
    cards = [_describe(model_entry(model)).card for model in settings.models]
    return ModelCatalog(cards, default=settings.default_model)


def _describe(entry: ModelEntry) -> ModelEntry:
    try:
        return describe_entry(entry)
    except CheckpointError:
        return entry


def model_entry(model: ModelSettings) -> ModelEntry:
    """Return the registry entry of a configured model. Raises ConfigError."""
    return resolve_entry(
        model.name,
        path=model.path,
        repo_id=model.repo_id,
        revision=model.revision,
        aliases=model.aliases,
        max_duration_s=model.max_duration_s,
        duration_padding_s=model.duration_padding_s,
        edit_schedule=model.edit_schedule,
        lora_stacking=model.lora_stacking,
        backend=model.backend,
    )


def ingress_options(settings: Settings, nodes: Sequence[Slot] = ()) -> dict[str, Any]:
    """Return the deployment options of the HTTP ingress. `nodes` has the resources of each node of a cluster."""
    ingress = settings.ingress
    num_nodes = sum(node.cpus >= ingress.num_cpus for node in nodes)
    return {
        "name": INGRESS_NAME,
        "num_replicas": ingress.replicas,
        "max_ongoing_requests": _NO_LIMIT,
        "health_check_period_s": 1.0,  # short, because HAProxy sends requests to a dead replica until the next check
        **_drain_options(settings),
        **_spread_options(ingress.replicas, num_nodes=num_nodes),
        "ray_actor_options": {"num_cpus": ingress.num_cpus, "runtime_env": {"env_vars": _ON_ONE_LOOP}},
    }


def runner_options(settings: Settings, nodes: Sequence[Slot] = ()) -> dict[str, Any]:
    """Return the deployment options of the job runners. They reserve no CPU, because they mostly wait for models.

    `nodes` has the resources of each node of a cluster. Only nodes with CPUs count, because the configuration of a
    cluster may let runners reserve a part of a CPU.
    """
    num_nodes = sum(node.cpus > 0 for node in nodes)
    return {
        "name": RUNNER_NAME,
        "num_replicas": settings.jobs.runners,
        "max_ongoing_requests": 1000,  # high, because a runner only receives short calls, such as `wake`
        "health_check_period_s": 2.0,  # short, because the jobs of a dead runner wait until the next check
        "graceful_shutdown_timeout_s": 10.0,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
        **_spread_options(settings.jobs.runners, num_nodes=num_nodes),
        "ray_actor_options": {"num_cpus": 0},
    }


def model_options(plan: Plan, model: ModelSettings, *, cluster_gpus: float) -> dict[str, Any]:
    """Return the deployment options of one model on a cluster with `cluster_gpus` GPUs. Raises ConfigError."""
    slot = replica_slot(plan.settings, model, cluster_gpus=cluster_gpus)
    replicas = model.replicas
    return {
        "name": model.name,
        "max_ongoing_requests": _MOST_REQUESTS,
        "max_queued_requests": _MOST_REQUESTS,
        **_drain_options(plan.settings),
        "max_constructor_retry_count": _CONSTRUCTOR_ATTEMPTS,
        "health_check_period_s": 1.0,  # short, because routers send requests to a dead replica until the next check
        "request_router_config": {
            "request_router_class": _ROUTER,
            "request_router_kwargs": {"model": model.name},
            "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
        },
        "max_surge_percent": _ONE_REPLICA if replicas.surge else 0,
        "autoscaling_config": {
            "min_replicas": plan.least_replicas[model.name],
            "max_replicas": replicas.max_replicas,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            **_OBSERVATION,
            "policy": {
                "policy_function": _POLICY,
                "policy_kwargs": {"target_wait_s": replicas.target_wait_s},
            },
        },
        "ray_actor_options": {
            "num_cpus": slot.cpus,
            "num_gpus": slot.gpus,
            "runtime_env": {} if slot.gpus else {"env_vars": _without_gpu(plan.settings, model)},
        },
    }


def _without_gpu(settings: Settings, model: ModelSettings) -> dict[str, str]:
    """Return the environment variables of a replica that reserves no GPU.

    They hide all GPUs, which Ray 2.60 does not do, unless the settings say that the model runs on a GPU.
    """
    device = model.device or settings.device or ""
    hidden = {} if device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""}
    return hidden | allocator_variables()


def allocator_variables() -> dict[str, str]:
    """Return the environment variables that give a process jemalloc, from Ray's package, as its allocator.

    A model on a CPU allocates many large blocks. By default, glibc returns them to the kernel, and each call spends up
    to a tenth of its time on new pages. If glibc keeps them, small objects between them make the memory grow.

    Returns nothing if Ray's package has no jemalloc for this machine, if LD_PRELOAD is set, or if the path of the
    library has spaces or colons, at which the loader would split it.
    """
    spec = find_spec("ray")
    for folder in (spec and spec.submodule_search_locations) or ():
        library = os.path.join(folder, "core", "libjemalloc.so")
        is_usable = os.path.exists(library) and os.sysconf("SC_PAGE_SIZE") <= _ALLOCATOR_PAGE_BYTES
        if is_usable and "LD_PRELOAD" not in os.environ and not re.search(r"[\s:]", library):
            return {"LD_PRELOAD": library, "MALLOC_CONF": _ALLOCATOR}
    return {}


def _spread_options(num_replicas: int, *, num_nodes: int) -> dict[str, Any]:
    """Return the deployment option that keeps more than half of several replicas off any one of several nodes.

    Ray Serve would fill one node before the next (RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY). If this node were lost, no
    replica would be left.
    """
    if num_replicas == 1 or num_nodes <= 1:
        return {}
    return {"max_replicas_per_node": min(math.ceil(num_replicas / 2), _MOST_PER_NODE)}


def _drain_options(settings: Settings) -> dict[str, Any]:
    """Return the deployment options that give a stopping replica time to finish the longest possible request."""
    return {
        "graceful_shutdown_timeout_s": settings.api.max_deadline_s,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
    }
