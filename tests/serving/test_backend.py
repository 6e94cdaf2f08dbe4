"""How `RayBackend` treats the outcomes of calls to model replicas. Fake handles stand for Ray's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import NodeDiedError, OwnerDiedError, RayActorError, RayError
from ray.serve.exceptions import RequestCancelledError

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import ModelUnavailableError, OverloadedError, StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving import backend as backend_module
from stable_audio_serve.serving import model_states
from stable_audio_serve.serving.backend import RayBackend
from tests.backends import make_catalog
from tests.patience import PATIENCE_S

_REQUEST = GenerationRequest(prompt="rain", duration_s=1.0, seed=7, steps=4)
_RESULT = GenerationResult((), 44100, "small-sfx", (7,))


def backend(*answers: GenerationResult | StableAudioError | RayError) -> RayBackend:
    """Return a backend whose calls are answered with these answers, one after another."""
    left = list(answers)

    async def generate(_: GenerationRequest) -> GenerationResult | StableAudioError:
        answer = left.pop(0)
        if isinstance(answer, RayError):
            raise answer
        return answer

    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=generate))
    return RayBackend(make_catalog(), {"small-sfx": handle}, application="default")


@pytest.mark.parametrize("lost", [NodeDiedError("its node is gone"), OwnerDiedError("ab", "", "")])
async def test_result_lost_with_its_node_is_retried_once(lost: RayError) -> None:
    assert await backend(lost, _RESULT).generate("small-sfx", _REQUEST) == _RESULT
    with pytest.raises(ModelUnavailableError):
        await backend(lost, lost).generate("small-sfx", _REQUEST)


async def test_retry_times_of_refused_clients_vary_by_a_quarter() -> None:
    model = backend(*[OverloadedError("the model's queue is full", retry_after_s=8.0)] * 50, _RESULT)
    waits = []
    for _ in range(50):
        with pytest.raises(OverloadedError, match="queue is full") as refusal:
            await model.generate("small-sfx", _REQUEST)
        waits.append(refusal.value.retry_after_s or 0.0)
    assert 8.0 <= min(waits) < 8.5
    assert 9.5 < max(waits) <= 10.0
    assert await model.generate("small-sfx", _REQUEST) == _RESULT  # the refusals did not stop this call


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica has published that a denoising step takes 10 s."""
    published = Prices(row_ms=0.0, evaluation_ms=10_000.0, evaluated_second_ms=0.0, audio_second_ms=0.0)
    monkeypatch.setattr(backend_module, "last_prices", lambda _: published)


@dataclass
class LoopClock:
    """Stands for the clock of a test's event loop. It stands still until the test changes `now`."""

    now: float

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LoopClock]:
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop.time())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", clock)
        yield clock


@pytest.mark.usefixtures("prices")
async def test_a_refusal_is_repeated_while_the_model_is_full(clock: LoopClock) -> None:
    """After the model's refusal, the backend refuses requests of that client and priority that are not shorter.

    Others reach the model.
    """
    full = OverloadedError("the model's queue is full", retry_after_s=100.0, full_for_s=30.0, work_s=50.0)
    model = backend(full, full, *[_RESULT] * 3)
    batch = replace(_REQUEST, priority="batch")

    async def wait_s(request: GenerationRequest) -> float:
        with pytest.raises(OverloadedError, match="queue is full") as refusal:
            await model.generate("small-sfx", request)
        return refusal.value.retry_after_s or 0.0

    assert await wait_s(_REQUEST) == pytest.approx(112.5, abs=13.5)
    assert await wait_s(batch) == pytest.approx(112.5, abs=13.5)  # another priority gets the model's second answer
    assert await wait_s(_REQUEST) == pytest.approx(168.75, abs=19.75)  # each repetition adds `work_s`
    assert await wait_s(replace(_REQUEST, steps=9)) == pytest.approx(270.0, abs=31.0)  # or its longer device time
    assert await model.generate("small-sfx", replace(_REQUEST, client="another")) == _RESULT
    assert await model.generate("small-sfx", replace(_REQUEST, steps=1)) == _RESULT
    clock.now += 1.1  # the backend repeats a refusal for at most a second
    assert await model.generate("small-sfx", _REQUEST) == _RESULT


@pytest.mark.usefixtures("prices")
async def test_refused_work_delays_a_client_by_ten_minutes_at_most(clock: LoopClock) -> None:
    full = OverloadedError("the model's queue is full", retry_after_s=8.0, full_for_s=30.0, work_s=200.0)
    model = backend(full, full)
    for _ in range(5):
        with pytest.raises(OverloadedError) as refusal:
            await model.generate("small-sfx", _REQUEST)
    assert refusal.value.retry_after_s == pytest.approx(675.0, abs=80.0)
    clock.now += 1.1
    with pytest.raises(OverloadedError) as refusal:
        await model.generate("small-sfx", _REQUEST)  # the model's second answer
    assert refusal.value.retry_after_s == pytest.approx(675.0, abs=80.0)


@pytest.mark.usefixtures("prices")
async def test_a_repeated_refusal_ends_when_the_model_has_room(clock: LoopClock) -> None:
    full = OverloadedError("the model's queue is full", retry_after_s=8.0, full_for_s=0.01)
    model = backend(full, _RESULT)
    with pytest.raises(OverloadedError):
        await model.generate("small-sfx", _REQUEST)
    clock.now += 0.02
    assert await model.generate("small-sfx", _REQUEST) == _RESULT


async def test_answer_marks_the_model_ready_while_the_controller_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """While Ray's head is down, the model's state cannot be read.

    If the model answers a request, the backend must report that the model is ready.
    """
    head_is_back = threading.Event()

    def silent(application: str) -> None:
        assert head_is_back.wait(60)
        raise RayError("it was away")

    monkeypatch.setattr(model_states, "read_application", silent)
    model = backend(_RESULT)
    try:
        assert (await model.status())["small-sfx"].stage == "loading"
        await model.generate("small-sfx", _REQUEST)
        statuses = [await model.status() for _ in range(1000)]  # none of these calls waits for the controller again
        assert {status["small-sfx"].stage for status in statuses} == {"ready"}
    finally:
        head_is_back.set()


async def test_a_slow_controller_does_not_delay_readers_of_a_recent_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, each probe of a load balancer would take as long as the controller."""
    asked, may_answer = threading.Event(), threading.Event()
    application = SimpleNamespace(deployments={})

    def answer(_: str) -> Any:
        if asked.is_set():
            assert may_answer.wait(60)
        asked.set()
        return application

    monkeypatch.setattr(model_states, "read_application", answer)
    monkeypatch.setattr(model_states, "_FRESH_S", 0.0)
    monkeypatch.setattr(model_states, "_USABLE_S", 3600.0)
    monkeypatch.setattr(model_states, "CachedQuery", partial(CachedQuery, timeout_s=3600.0))
    model = backend(_RESULT)
    try:
        await model.status()
        async with asyncio.timeout(PATIENCE_S):
            await model.status()
    finally:
        may_answer.set()


class PendingCall:
    """A call of a replica that is answered when `answer` is called."""

    def __init__(self) -> None:
        self._result: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Any:
        return self._result.__await__()

    def answer(self) -> None:
        self._result.set_result(_RESULT)

    def cancel(self) -> None:
        self._result.set_exception(RequestCancelledError())


async def test_a_failed_update_cancels_only_calls_that_no_replica_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update stops the only replica, which still works on a call, and the new replica fails to start."""
    calls: list[PendingCall] = []

    def generate(_: GenerationRequest) -> PendingCall:
        calls.append(PendingCall())
        return calls[-1]

    running = SimpleNamespace(status="HEALTHY", status_trigger="", replica_states={"RUNNING": 1}, message="")
    failed = SimpleNamespace(status="DEPLOY_FAILED", status_trigger="", replica_states={"STOPPING": 1}, message="")
    application = SimpleNamespace(deployments={"small-sfx": running})
    monkeypatch.setattr(model_states, "read_application", lambda _: application)
    for module, name in ((backend_module, "_LOAD_CHECK_S"), (model_states, "_FRESH_S")):
        monkeypatch.setattr(module, name, 0.02)
    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=generate), options=lambda: None)
    model = RayBackend(make_catalog(), {"small-sfx": handle}, application="default")
    held = await begin_on_a_replica(monkeypatch, model)
    application.deployments["small-sfx"] = failed
    with pytest.raises(ModelUnavailableError, match="failed to load"):
        await model.generate("small-sfx", _REQUEST)
    assert not held.done()
    calls[0].answer()
    assert await held == _RESULT


async def begin_on_a_replica(monkeypatch: pytest.MonkeyPatch, model: RayBackend) -> asyncio.Task[GenerationResult]:
    """Begin a call, and return when the backend has read the model's status twice since then."""
    reads = asyncio.Semaphore(0)
    read = model.status

    async def read_and_count() -> Any:
        status = await read()
        reads.release()
        return status

    monkeypatch.setattr(model, "status", read_and_count)
    held = asyncio.create_task(model.generate("small-sfx", _REQUEST))
    async with asyncio.timeout(PATIENCE_S):
        await reads.acquire()
        await reads.acquire()
    return held


def make_watching(
    monkeypatch: pytest.MonkeyPatch, model: SimpleNamespace
) -> tuple[RayBackend, dict[str, SimpleNamespace]]:
    """Return a backend whose calls of replicas are never answered, and the deployments that Ray Serve lists: `model`.

    The backend reads the list for each status.
    """
    deployments = {"small-sfx": model}
    monkeypatch.setattr(model_states, "read_application", lambda _: SimpleNamespace(deployments=deployments))
    for name in ("_FRESH_S", "_USABLE_S"):
        monkeypatch.setattr(model_states, name, 0.0)
    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=lambda _: PendingCall()), options=lambda: None)
    return RayBackend(make_catalog(), {"small-sfx": handle}, application="default"), deployments


async def test_requests_do_not_wait_for_replicas_that_never_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only replica has died, and Ray Serve tries again and again to start another."""
    model = SimpleNamespace(status="UNHEALTHY", status_trigger="", replica_states={"STARTING": 1}, message="")
    monkeypatch.setattr(backend_module, "_LOAD_CHECK_S", 0.02)
    backend, _ = make_watching(monkeypatch, model)
    assert (await backend.status())["small-sfx"].stage == "loading"
    model.status_trigger = "REPLICA_STARTUP_FAILED"
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ModelUnavailableError, match="failed to load again"):
            await backend.generate("small-sfx", _REQUEST)
    assert (await backend.status())["small-sfx"].stage == "failed"
    model.status, model.replica_states = "HEALTHY", {"RUNNING": 1}
    assert (await backend.status())["small-sfx"].stage == "ready"


async def test_call_of_a_replica_that_died_ends_when_no_other_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's controller notices only seconds later that the replica has died."""
    model = SimpleNamespace(status="HEALTHY", status_trigger="", replica_states={"RUNNING": 1}, message="")
    monkeypatch.setattr(backend_module, "_LOAD_CHECK_S", 0.02)
    backend, _ = make_watching(monkeypatch, model)
    held = await begin_on_a_replica(monkeypatch, backend)
    model.status, model.status_trigger = "UNHEALTHY", "REPLICA_STARTUP_FAILED"
    model.replica_states = {"STARTING": 1}
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ModelUnavailableError, match="failed to load again"):
            await held


async def test_call_is_not_ended_by_a_failure_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model failed some time ago. As long as the controller does not answer, it may have started since then."""
    model = SimpleNamespace(status="DEPLOY_FAILED", status_trigger="", replica_states={}, message="")
    monkeypatch.setattr(backend_module, "_LOAD_CHECK_S", 0.02)
    backend, _ = make_watching(monkeypatch, model)
    assert (await backend.status())["small-sfx"].stage == "failed"
    with monkeypatch.context() as silent:
        silent.setattr(model_states, "read_application", Mock(side_effect=RayActorError()))
        held = await begin_on_a_replica(silent, backend)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ModelUnavailableError, match="failed to load"):
            await held


async def test_an_update_that_is_being_built_or_was_refused_changes_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile Ray Serve lists no deployments, but their replicas run."""
    running = SimpleNamespace(status="HEALTHY", status_trigger="", replica_states={"RUNNING": 1}, message="")
    backend, deployments = make_watching(monkeypatch, running)
    assert (await backend.status())["small-sfx"].stage == "ready"
    deployments.clear()
    assert (await backend.status())["small-sfx"].stage == "ready"
    assert backend.status_age_s < PATIENCE_S


@pytest.mark.parametrize("state", ["PENDING_MIGRATION", "RECOVERING"])
async def test_replica_that_is_migrating_or_recovering_is_ready(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    states = {state: 1, "STARTING": 1}
    model = SimpleNamespace(status="UPDATING", status_trigger="", replica_states=states, message="")
    status = (await make_watching(monkeypatch, model)[0].status())["small-sfx"]
    assert (status.stage, status.num_replicas) == ("ready", 1)
