"""A checkpoint with bad audio is deployed on a server under load. Still, every answer comes from the good weights.

If the machine has room for two replicas, the old one stays until the new one has passed the quality gate. Otherwise,
the new replica uses the last good weights.
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
import wave
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from tests.models.revisions import BAD, GOOD, copy_checkpoint, fill_revisions, scale, spoil
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]

_BODY = {"prompt": "rain", "duration": 1.0, "seed": 5, "steps": 2}
_PAUSE_S = 0.1  # between two requests of a client, so that new replicas get CPU time to start


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """Run a server with two models that have the same repository.

    An update of the model `spare` starts the new replica before it stops the old one. An update of `tight` stops the
    old one first.
    """
    folder = tmp_path_factory.mktemp("quality")
    good, bad = (copy_checkpoint(TINY, folder / name) for name in ("good", "bad"))
    spoil(bad, partial(scale, factor=2.0))  # this model works, but its audio is too loud
    fill_revisions(folder / "hub", "lab/tiny", {GOOD: good, BAD: bad}, main=GOOD)
    model = {
        "repo_id": "lab/tiny",
        "revision": GOOD,
        "max_queue_s": 1e6,
        "engine": {"warmup_budget_s": 0.2},
        "num_cpus": 0.5,
    }
    args = {
        "models": [
            {"name": "spare", **model, "replicas": {"surge": True}},
            {"name": "tight", **model, "replicas": {"surge": False}},
        ],
        "preload_models": ["spare", "tight"],
        "ingress": {"replicas": 2},
    }
    environment = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    launched = LaunchedServer(write_config(folder, args), environment=environment)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


class RepeatingClient:
    """A client that requests the same clip from a model again and again, each time on a new connection."""

    def __init__(self, server: LaunchedServer, model: str) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.model = model
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=PATIENCE_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.answers.append(generate(self._server, self.model))
            except httpx.HTTPError as error:
                self.answers.append((0, repr(error).encode()))
            time.sleep(_PAUSE_S)


def generate(server: LaunchedServer, model: str) -> tuple[int, bytes]:
    body = _BODY | {"model": model}
    answer = httpx.post(f"{server.url}/v1/audio/generations", json=body, timeout=PATIENCE_S, trust_env=False)
    return answer.status_code, answer.content


def clip_of(server: LaunchedServer, model: str) -> bytes:
    status, clip = generate(server, model)
    assert status == 200, clip
    return clip


def samples_of(clip: bytes) -> bytes:
    """Return the bytes of the WAV file's `data` chunk."""
    with wave.open(io.BytesIO(clip)) as reader:
        return reader.readframes(reader.getnframes())


def health_of(server: LaunchedServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/health", timeout=PATIENCE_S, trust_env=False).json()["models"])


def wait_for(server: LaunchedServer, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Poll `/health` until its field `models` meets the condition, and return the field.

    Only one of the two HTTP processes answers. The other one may still have an older state.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition(models := health_of(server)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return models


def deploy(server: LaunchedServer, revision: str) -> None:
    with server.look_inside("tests.serving.redeploy", json.dumps({"revision": revision})) as deploying:
        assert deploying.wait(PATIENCE_S) == 0


def is_refused(now: dict[str, Any]) -> bool:
    return bool(now["spare"]["refused_update"]) and (now["tight"]["quality"] or {}).get("gate") == "fallback"


def is_passed(now: dict[str, Any]) -> bool:
    models = now.values()
    return all((model["quality"] or {}).get("gate") == "passed" and not model["refused_update"] for model in models)


@pytest.fixture(scope="module")
def poisoned(updated: LaunchedServer) -> LaunchedServer:
    """Update both models to the bad weights under load. Check that every request gets the same clip as before."""
    before = wait_for(updated, is_passed)
    assert {model["quality"]["revision"] for model in before.values()} == {GOOD}
    assert "quality_gate" in before["spare"]["detail"]
    # The two models' files differ in the recipe, because it names the model, but not in the samples.
    clips = {name: clip_of(updated, name) for name in ("spare", "tight")}
    assert samples_of(clips["spare"]) == samples_of(clips["tight"])
    customers = [RepeatingClient(updated, model) for model in ("spare", "tight") for _ in range(2)]
    deploy(updated, BAD)
    try:
        wait_for(updated, is_refused)
    except AssertionError:
        raise AssertionError(health_of(updated), updated.output) from None
    finally:
        for customer in customers:
            customer.stop()
    for customer in customers:
        assert len(customer.answers) > 3
        assert {status for status, _ in customer.answers} == {200}, customer.answers[-1]
        assert {audio for _, audio in customer.answers} == {clips[customer.model]}
    assert clip_of(updated, "tight") == clips["tight"]
    return updated


def test_poisoned_checkpoint_never_gets_traffic(poisoned: LaunchedServer) -> None:
    after = wait_for(poisoned, is_refused)
    assert {after[name]["stage"] for name in after} == {"ready"}
    assert after["spare"]["quality"]["gate"] == "passed"
    assert {after[name]["quality"]["revision"] for name in after} == {GOOD}
    assert "+6.02 dB" in after["tight"]["quality"]["problem"]
    assert "+6.02 dB" in poisoned.output


@pytest.mark.chaos  # slow: one more update
def test_redeploying_the_good_revision_clears_the_problem(poisoned: LaunchedServer) -> None:
    deploy(poisoned, GOOD)
    wait_for(poisoned, is_passed)
    assert {generate(poisoned, name)[0] for name in ("spare", "tight")} == {200}
