"""A program that tests autoscaling: two Ray nodes with simulated GPUs, simulated models, and a load that changes.

It prints, as JSON, how the number of replicas changed, the outcomes of requests and jobs, and the errors for settings
that a server refuses on two nodes.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from benchmarks.servers.timed import DEVICE, TimedReplica
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.jobs.open import open_store
from stable_audio_serve.serving.app import assemble, build
from stable_audio_serve.serving.autoscaling import autoscaling_stats
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.jobs.conftest import make_spec
from tests.patience import PATIENCE_S, wait_until

_APPLICATION = "audio"
_REFUSED = "refused"
_CLIENTS = 30
_WORK_STEPS = 2500  # steps of all jobs together; they take half a minute
_REPLICAS = {"max_replicas": 3, "target_wait_s": 1, "upscale_delay_s": 0.5, "downscale_delay_s": 2}


class ReportingReplica(TimedReplica):
    """A replica with a simulated device, with the methods for jobs and for the autoscaling policy."""

    def __init__(self, settings: Settings, model: ModelSettings) -> None:
        super().__init__(settings, model)
        self._accepted_s = 0.0  # sum of the device times of all accepted requests
        self._measured_at = time.monotonic(), 0.0
        self._waiting = 0.0, float("-inf")

    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        if self.backlog_s <= self._max_queue_s:
            self._accepted_s += self.times.stages(request).total_ms / 1000.0
        return await super().generate(request)

    async def generate_reporting(
        self, request: GenerationRequest
    ) -> AsyncIterator[Progress | GenerationResult | StableAudioError]:
        yield Progress("denoising", 0.0)
        yield await self.generate(request)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve."""
        now, busy_s = time.monotonic(), self._accepted_s - self.backlog_s
        before, busy_before_s = self._measured_at
        self._measured_at = now, busy_s
        waiting_s, reported_at = self._waiting
        return autoscaling_stats(
            work_s=self.backlog_s,
            busy_share=min(1.0, max(0.0, busy_s - busy_before_s) / max(now - before, 0.1)),
            waiting_s=waiting_s if now - reported_at < 5.0 else 0.0,
        )

    async def note_waiting(self, seconds: float, is_kept: bool = False) -> None:
        """Called by job runners. Stores how many seconds of work wait in queued jobs."""
        self._waiting = seconds, time.monotonic()


@dataclass
class ReplicaHistory:
    """How the number of a model's replicas changed, and on which nodes its replicas were."""

    counts: list[int] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)

    def note(self, nodes: list[str]) -> None:
        if not self.counts or self.counts[-1] != len(nodes):
            self.counts.append(len(nodes))
        self.nodes.update(nodes)


class Observer:
    """A thread that polls the replicas of all models and records their history."""

    def __init__(self, *models: str) -> None:
        self.histories = {model: ReplicaHistory() for model in models}
        threading.Thread(target=self._run, daemon=True).start()

    def wait_for(self, model: str, count: int) -> None:
        wait_until(lambda: self.histories[model].counts[-1:] == [count])

    def _run(self) -> None:
        while True:
            details = serve.context._get_global_client().get_serve_details()["applications"][_APPLICATION]
            for model, seen in self.histories.items():
                if model in details["deployments"]:
                    replicas = details["deployments"][model]["replicas"]
                    seen.note([replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"])
            time.sleep(0.1)


async def crowd(send: Callable[[int], object], is_over: Callable[[], bool]) -> list[str]:
    """Run clients that call `send` repeatedly until `is_over` returns True. Returns the outcome of each call."""
    outcomes: list[str] = []

    async def client(number: int) -> None:
        while not is_over():
            try:
                await send(number)  # type: ignore[misc]
                outcomes.append("ok")
            except Exception as error:  # noqa: BLE001  # an error is an outcome, too
                outcomes.append(repr(error))

    await asyncio.gather(*map(client, range(_CLIENTS)))
    return outcomes


def load_comes_and_goes(backend: RayBackend, observer: Observer) -> list[str]:
    """Send requests until the model has three replicas, pause until it has none, and send more until it has one.

    Returns the outcomes of the first requests.
    """

    async def ask(seed: int) -> None:
        await backend.generate("lazy", GenerationRequest(prompt="", duration_s=1.0, steps=40, seed=seed))

    async def run() -> list[str]:
        counts = observer.histories["lazy"].counts
        ends_at = time.monotonic() + PATIENCE_S
        outcomes = await crowd(ask, lambda: counts[-1:] == [3] or time.monotonic() > ends_at)
        await asyncio.to_thread(observer.wait_for, "lazy", 0)
        while counts[-1] == 0:
            await ask(0)
        return outcomes

    return asyncio.run(run())


def jobs_wait(settings: Settings, observer: Observer, number: int) -> dict[str, int]:
    """Submit `number` jobs and wait until all have succeeded. Returns the number of jobs in each state."""
    store = open_store(settings)
    observer.wait_for("busy", 1)
    request = GenerationRequest(prompt="", duration_s=1.0, steps=_WORK_STEPS // number, seed=0)
    for added in store.clients.add_all([make_spec(model="busy", request=request) for _ in range(number)]):
        assert not isinstance(added, Exception), added
    wait_until(lambda: store.operators.counts().get("succeeded", 0) == number, every_s=0.2)
    observer.wait_for("busy", 1)
    return dict(store.operators.counts())


def load_is_steady(backend: RayBackend, observer: Observer) -> list[int]:
    """Keep two replicas busy for four fifths of the time, without a backlog.

    Returns the number of replicas in each of the last 15 s. This is long enough for the autoscaling to remove a
    replica: its statistics cover a shorter time, and its delays are shorter, too. If this process stalls, replicas are
    idle and may be removed, so the observation begins again.
    """
    request = GenerationRequest(prompt="", duration_s=1.0, steps=40, seed=0)
    pause_s = DEVICE.stages(request).total_ms / 1000.0 / (0.8 * 2)
    counts = observer.histories["busy"].counts

    async def run() -> list[int]:
        running: set[asyncio.Task[object]] = set()
        seen: list[int] = []
        arrivals = random.Random(1)
        looked_at = due_at = time.monotonic()
        ends_at = due_at + PATIENCE_S
        while len(seen) < 35 and time.monotonic() < ends_at:
            task = asyncio.create_task(backend.generate("busy", request))
            running.add(task)
            task.add_done_callback(running.discard)
            # Late requests are sent at once, so that the load is the same on a slow machine.
            due_at += arrivals.expovariate(1.0 / pause_s)
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            if time.monotonic() > due_at + 1.0:
                due_at = time.monotonic()
                seen.clear()
            if time.monotonic() > looked_at + 1.0:
                looked_at = time.monotonic()
                seen.append(counts[-1])
        await asyncio.gather(*running)
        return seen[-15:]

    return asyncio.run(run())


def refused_databases(folder: str) -> list[str]:
    """Start the server with SQLite, which several nodes cannot share, and then with an unreachable job database.

    Return both error messages.
    """
    messages = []
    for url in (None, "postgresql://somebody@nowhere.invalid/jobs"):
        settings = {"models": [{"name": "tiny", "path": folder}], "jobs": {"database_url": url}}
        try:
            build(Settings.model_validate(settings))
        except RayServeException as error:
            messages.append(str(error))
    return messages


def failed_deployments() -> list[str]:
    """Deploy a model without files, and one with an invalid setting. Return Ray Serve's messages."""
    messages = []
    for args in ({"models": [{"name": "lab", "repo_id": "lab/model"}]}, {"modles": []}):
        application = {"name": _REFUSED, "import_path": "stable_audio_serve.serving.app:build", "args": args}
        schema = ServeDeploySchema.model_validate({"applications": [application | {"route_prefix": "/refused"}]})
        serve.context._get_global_client().deploy_apps(schema)
        wait_until(lambda: serve.status().applications[_REFUSED].status == "DEPLOY_FAILED", every_s=0.2)
        messages.append(serve.status().applications[_REFUSED].message)
    return messages


def main(folder: str, database_url: str, num_jobs: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    failed = failed_deployments()
    cluster.add_node(num_cpus=1, num_gpus=2)
    cluster.wait_for_nodes()
    refused = refused_databases(folder)
    model = {"path": folder, "num_gpus": 0.5, "num_cpus": 0}
    settings = Settings.model_validate(
        {
            "models": [
                model | {"name": "lazy", "replicas": _REPLICAS | {"min_replicas": 0}},
                model | {"name": "busy", "replicas": _REPLICAS | {"min_replicas": 1}},
            ],
            "jobs": {"database_url": database_url},
            "output_dir": "out",
        }
    )
    serve.run(assemble(settings, replica=ReportingReplica), name=_APPLICATION)
    observer = Observer("lazy", "busy")
    handle = serve.get_deployment_handle("lazy", _APPLICATION)
    backend = RayBackend(plan_deployments(settings).catalog, {"lazy": handle}, application=_APPLICATION)
    jobs = jobs_wait(settings, observer, int(num_jobs))
    outcomes = load_comes_and_goes(backend, observer)
    counted = {
        model: {"counts": list(seen.counts), "nodes": len(seen.nodes)} for model, seen in observer.histories.items()
    }
    steady = load_is_steady(
        RayBackend(backend.catalog, {"busy": serve.get_deployment_handle("busy", _APPLICATION)}, application="audio"),
        observer,
    )
    result = {
        "outcomes": {outcome: outcomes.count(outcome) for outcome in set(outcomes)},
        "jobs": jobs,
        "steady": steady,
        "refused": refused,
        "failed": failed,
        **counted,
    }
    print("results: " + json.dumps(result))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
