"""Commands for operators with a real server: keep a model loaded and release it, status, dead letters and draining."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_artifacts, open_store
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.backends import ToneBackend, make_catalog
from tests.jobs.conftest import SHORT_PAUSES
from tests.patience import PATIENCE_S, wait_until
from tests.serving.conftest import LAZY, TINY, model
from tests.serving.launched import LaunchedServer, write_config
from tests.serving.stopping import DRAIN_S, check_that_stopping_finishes_work

pytestmark = [pytest.mark.server, pytest.mark.slow]

_DOWNSCALE_DELAY_S = 2.0
_BODY = {"prompt": "a door closes", "duration": 2, "seed": 5, "steps": 3}
_SECONDS_OF_WORK = _BODY | {"steps": 400, "batch_size": 2, "duration": 16}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def operated(folder: Path) -> Iterator[LaunchedServer]:
    """Run a server that requires API keys and runs one job at a time.

    The model `tiny` is preloaded, `lazy` is loaded by its first request and soon unloaded, and `broken` cannot load.
    """
    broken = folder / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model.safetensors").write_bytes(b"nothing of use")
    keys = folder / "keys"
    keys.write_text(f"root:{hash_key('admin')} scope=admin,jobs,generate\nstudio:{hash_key('plain')}\n")
    keys.chmod(0o600)
    (folder / "admin.key").write_text("admin\n")
    (folder / "plain.key").write_text("plain\n")
    soon = {"max_replicas": 1, "downscale_delay_s": _DOWNSCALE_DELAY_S}
    args = {
        "models": [
            model("tiny", max_queue_s=1e6),
            model("lazy", LAZY, replicas=soon),
            model("broken", str(broken)),
        ],
        "api": {"key_file": str(keys)},
        "jobs": {"max_attempts": 1, "max_running": 1},
        "drain_s": DRAIN_S,
    }
    config = write_config(folder, args)
    environment = {
        "STABLE_AUDIO_MAX_STEPS": "1000",
        "STABLE_AUDIO_MAX_DURATION": "20",
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # `broken` can never start, so one attempt is enough
    }
    launched = LaunchedServer(config, environment=environment)
    try:
        launched.wait_until_ready()
        launched.client.headers["Authorization"] = "Bearer admin"
        yield launched
    finally:
        if launched.process.poll() is None:
            launched.stop(number=signal.SIGKILL)


@pytest.fixture
def run(operated: LaunchedServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command of `stable-audio-serve` with an admin's API key, and returns its output."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STABLE_AUDIO_URL", operated.url)

    def invoke(*arguments: str, code: int = 0, key: str = "admin") -> str:
        result = CliRunner().invoke(app, [*arguments, "--key-file", f"{key}.key"])
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def status_of(server: LaunchedServer) -> dict[str, Any]:
    reply = server.client.get("/v1/status")
    assert reply.status_code == 200
    found: dict[str, Any] = reply.json()
    return found


def test_loaded_model_stays_until_it_is_unloaded(operated: LaunchedServer, run: Run) -> None:
    assert status_of(operated)["models"]["lazy"]["stage"] == "idle"
    run("admin", "load", "lazy", code=4, key="plain")
    assert "it is ready now" in run("admin", "load", "lazy", "--wait", str(PATIENCE_S))
    (replica,) = wait_until(lambda: [r for r in status_of(operated)["models"]["lazy"]["replicas"] if r["device"]])
    assert (replica["dtype"], replica["requests"], replica["backlog_s"]) == ("float32", 0, 0)
    until = time.monotonic() + 4 * _DOWNSCALE_DELAY_S
    while time.monotonic() < until:
        lazy = status_of(operated)["models"]["lazy"]
        assert (lazy["kept"], lazy["stage"], lazy["states"]) == (True, "ready", {"running": 1})
        assert [each["id"] for each in lazy["replicas"]] == [replica["id"]]
        time.sleep(0.5)
    run("admin", "unload", "lazy")
    wait_until(lambda: status_of(operated)["models"]["lazy"]["stage"] == "idle")
    lazy = wait_until(lambda: (found := status_of(operated)["models"]["lazy"])["states"] == {} and found)
    assert (lazy["kept"], lazy["replicas"], lazy["backlog_s"]) == (False, [], 0)


def test_status_shows_work_and_a_dead_replica(operated: LaunchedServer, run: Run) -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(operated.client.post, "/generate", json=_SECONDS_OF_WORK)

        def busy() -> dict[str, Any] | None:
            (replica,) = status_of(operated)["models"]["tiny"]["replicas"] or [{}]
            return replica if replica.get("rows_per_step") else None

        replica = wait_until(busy)
        assert replica["requests"] == 1
        assert replica["backlog_s"] > 0
        shown = run("status")
        assert "tiny *" in shown
        assert replica["id"] in shown
        (pid,) = operated.pids("ray::ServeReplica:audio:tiny")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not status_of(operated)["ready"])
        assert "loading" in run("status", code=1)
        wait_until(lambda: status_of(operated)["ready"])
    (again,) = wait_until(lambda: status_of(operated)["models"]["tiny"]["replicas"])
    assert again["id"] != replica["id"]
    found = json.loads(run("status", "--json", key="plain"))
    assert found["models"]["lazy"]["stage"] == "idle"
    assert operated.client.post("/generate", json=_BODY).status_code == 200
    wait_until(lambda: status_of(operated)["models"]["tiny"]["requests_per_minute"])


def test_dead_letter_is_retried_once(operated: LaunchedServer, run: Run) -> None:
    ticket = operated.client.post("/jobs", json=_BODY | {"model": "broken"}).json()

    def letters() -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(run("admin", "dead-letters", "--json"))
        return listed

    (letter,) = wait_until(letters)
    assert (letter["id"], letter["client"], letter["error"]["code"]) == (ticket["id"], "root", "unavailable")
    number = str(letter["number"])
    assert status_of(operated)["models"]["broken"]["stage"] == "failed"
    assert "it is failed now" in run("admin", "load", "broken", "--wait", str(PATIENCE_S), code=1)
    run("admin", "unload", "broken")
    assert "1 queued again" in run("admin", "dead-letters", number, "--retry")
    assert "no dead letters: 999" in run("admin", "dead-letters", "999", "--retry", code=2)
    wait_until(letters)
    shown = run("admin", "dead-letters", number)
    assert shown.count("tried again by an operator") == 1
    assert sum(line.split()[-1:] == ["started"] for line in shown.splitlines()) == 2  # the job has started twice
    assert "1 deleted" in run("admin", "dead-letters", "--delete", "--all")
    assert letters() == []
    wait_until(lambda: status_of(operated)["jobs"]["dead_letters"] == 0)


def test_drained_server_finishes_its_work_under_load(operated: LaunchedServer, run: Run, folder: Path) -> None:
    client = operated.client
    jobs = [client.post("/jobs", json=_SECONDS_OF_WORK).json() for _ in range(3)]

    def state(job: dict[str, Any]) -> str:
        return str(client.get(job["status_url"]).json()["status"])

    with ThreadPoolExecutor() as pool:
        wait_until(lambda: [state(job) for job in jobs] == ["running", "queued", "queued"])
        busy = [pool.submit(client.post, "/generate", json=_SECONDS_OF_WORK) for _ in range(2)]
        wait_until(lambda: status_of(operated)["models"]["tiny"]["replicas"][0]["requests"] == 3)
        draining = pool.submit(run, "admin", "drain", "--wait", str(PATIENCE_S))
        wait_until(lambda: client.get("/ready").status_code == 503)
        left = wait_until(lambda: None not in (found := status_of(operated)["draining"]).values() and found)
        assert left == {"state": "draining", "requests": 2, "jobs": 1}
        refused = client.post("/generate", json=_BODY)
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (503, True)
        assert client.post("/jobs", json=_BODY).status_code == 503
        assert [reply.result().status_code for reply in busy] == [200, 200]
        assert "drained: nothing is left to finish" in draining.result()
    assert [state(job) for job in jobs] == ["succeeded", "queued", "queued"]
    assert client.get(f"{operated.url}/jobs/{jobs[0]['id']}/audio").status_code == 200
    wait_until(lambda: status_of(operated)["models"]["tiny"]["waiting_jobs_s"])
    asyncio.run(finish_elsewhere(folder, lambda: [state(job) for job in jobs] == ["succeeded"] * 3))
    assert status_of(operated)["draining"]["state"] == "drained"
    wait_until(lambda: status_of(operated)["models"]["tiny"]["waiting_jobs_s"] == 0)
    run("admin", "resume")
    wait_until(lambda: client.get("/ready").status_code == 200)
    assert client.post("/generate", json=_BODY).status_code == 200
    last = client.post("/jobs", json=_BODY).json()
    wait_until(lambda: state(last) == "succeeded")


async def finish_elsewhere(folder: Path, is_done: Callable[[], bool]) -> None:
    """Run the jobs of the server's database with a job runner in this process, until `is_done` returns True."""
    settings = Settings.model_validate({"output_dir": str(folder / "outputs")})
    store = open_store(settings)
    tiny = replace(make_catalog().default, name="tiny", aliases=())
    runner = JobRunner(
        store,
        open_artifacts(settings),
        backend=ToneBackend(ModelCatalog([tiny]), statuses={"tiny": ModelStatus("ready", 1, "cpu")}),
        settings=settings,
        pauses=SHORT_PAUSES,
    )
    await runner.start()
    await asyncio.to_thread(wait_until, is_done)
    await runner.close()
    store.database.close()


def test_unreachable_server_has_its_own_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLE_AUDIO_URL", "http://127.0.0.1:9")
    assert "did not answer" in run("status", code=3)
    monkeypatch.setenv("STABLE_AUDIO_URL", "ftp://nobody")
    assert "STABLE_AUDIO_URL" in run("status", code=2)


def test_missing_key_is_reported(operated: LaunchedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STABLE_AUDIO_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["status", "--url", operated.url])
    assert (result.exit_code, "STABLE_AUDIO_API_KEY" in result.output) == (4, True)
    assert httpx.get(f"{operated.url}/v1/status").status_code == 401


def test_ctrl_c_stops_the_server_after_its_work_is_done(operated: LaunchedServer) -> None:
    """This server uses HAProxy. `test_lifecycle.py` has the same test for Ray's Python proxy."""
    check_that_stopping_finishes_work(operated, signal.SIGINT)
