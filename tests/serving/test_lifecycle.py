"""Starting and stopping servers: two on one machine, with HAProxy or Ray's Python proxy, and with faults.

A stopped server must leave no processes and no files.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.audio_files import pcm_of
from tests.models.hub import fill_cache
from tests.packaging.wheel import build_wheel, install_wheel
from tests.patience import PATIENCE_S, wait_until
from tests.served.conftest import probe_start
from tests.serving.conftest import TINY, model
from tests.serving.crash_app import MARK
from tests.serving.launched import LaunchedServer, command, free_port, write_config
from tests.serving.stopping import DRAIN_S, check_log, check_that_stopping_finishes_work

pytestmark = [pytest.mark.server, pytest.mark.slow]

_BODY = {"prompt": "a door closes", "duration": 2, "seed": 5, "steps": 3}
_LONG_BODY = _BODY | {"steps": 1000, "batch_size": 4, "duration": 16, "deadline_s": 0.5}


def make_args(**settings: Any) -> dict[str, Any]:
    return {"models": [model("tiny", aliases=["little"], max_queue_s=1e6)], **settings}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    launched = LaunchedServer(write_config(tmp_path_factory.mktemp("server"), make_args()))
    try:
        launched.probes = probe_start(launched)
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def test_a_crashed_engine_fails_no_request(tmp_path: Path) -> None:
    """Its replica ends at once, and its request is repeated on another replica."""
    args = {"models": [model("tiny", max_queue_s=1e6, replicas={"min_replicas": 2, "max_replicas": 2})]}
    config = write_config(tmp_path, args)
    config.write_text(config.read_text().replace("stable_audio_serve.serving.app", "tests.serving.crash_app"))
    launched = LaunchedServer(config, environment={MARK: str(tmp_path / "crashed")})
    try:
        url = launched.wait_until_ready().url
        before = launched.pids("ServeReplica:audio:tiny")
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            for prompt in ("crash", *(f"rain {number}" for number in range(40))):
                answer = client.post("/v1/audio/generations", json=_BODY | {"prompt": prompt})
                assert answer.status_code == 200, answer.text
        assert (tmp_path / "crashed").exists()
        wait_until(lambda: len(now := launched.pids("ServeReplica:audio:tiny")) == 2 and now != before)
    finally:
        launched.stop(number=signal.SIGKILL)


def test_a_closed_terminal_does_not_cut_requests_off(tmp_path: Path) -> None:
    limits = {"max_steps": 1000, "max_batch_size": 4}
    launched = LaunchedServer(write_config(tmp_path, make_args(api=limits, drain_s=DRAIN_S)))
    try:
        check_that_stopping_finishes_work(launched.wait_until_ready(), signal.SIGHUP)
    finally:
        launched.stop(number=signal.SIGKILL)


@pytest.fixture(scope="module")
def other(server: LaunchedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """Run a second server. Its environment has the address of the first server's Ray, but it must start its own Ray.

    The second server is installed from the wheel, uses Ray's Python proxy, and has its model in a Hugging Face cache.
    """
    address, token = server.ray()
    folder = tmp_path_factory.mktemp("other")
    (folder / ".env").write_text("STABLE_AUDIO_MAX_STEPS=1000\nSTABLE_AUDIO_MAX_BATCH_SIZE=9\n")
    fill_cache(folder / "hub", "lab/tiny", Path(TINY))
    tiny = {"name": "tiny", "aliases": ["little"], "max_queue_s": 1e6, "repo_id": "lab/tiny"}
    lacking = [{"name": "absent", "path": "/absent"}, {"name": "away", "repo_id": "lab/model"}]
    config = write_config(folder, {"models": [tiny, *lacking], "drain_s": DRAIN_S})
    installed = install_wheel(build_wheel(folder), folder / "installed")
    launched = LaunchedServer(
        config,
        program=[str(installed / "bin" / "stable-audio-serve"), "serve", "--config", str(config)],
        environment={
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(folder / "hub"),
            "STABLE_AUDIO_PROXY": "python",
            "PYTHONPATH": str(installed),
        },
    )
    try:
        launched.probes = probe_start(launched)
        yield launched.wait_until_ready()
    finally:
        if launched.process.poll() is None:
            launched.stop(number=signal.SIGKILL)


def test_starting_server_is_alive_long_before_it_is_ready(server: LaunchedServer, other: LaunchedServer) -> None:
    """The first server uses HAProxy, and the other one Ray's Python proxy."""
    for launched in (server, other):
        *loading, last = launched.probes
        assert len(loading) > 1  # the HTTP process answers before the model is ready
        assert {ready for _, ready in loading} == {503}
        assert {(health.status_code, health.json()["status"], health.json()["healthy"]) for health, _ in loading} == {
            (200, "loading", False)
        }
        assert last[1] == 200
        assert launched.client.get("/health").json()["device"] in ("cpu", "cuda:0")


def test_servers_side_by_side_give_the_same_audio(server: LaunchedServer, other: LaunchedServer) -> None:
    expected = server.client.post("/generate", json=_BODY)
    response = other.client.post("/generate", json=_BODY)
    assert response.status_code == 200
    # Not the whole files: the recipes in them name the number of threads, which depends on the number of models.
    assert pcm_of(response.content) == pcm_of(expected.content)


def test_cached_model_is_described_like_one_in_a_folder(server: LaunchedServer, other: LaunchedServer) -> None:
    cards = [launched.client.get("/v1/models").json()["data"][0] for launched in (server, other)]
    own = {"created", "max_steps"}  # may differ: the other server's .env allows more steps
    in_folder, in_cache = ({key: value for key, value in one.items() if key not in own} for one in cards)
    assert in_cache == in_folder
    assert in_cache["sample_rate_hz"] == 1000


def test_configured_proxy_runs(server: LaunchedServer, other: LaunchedServer) -> None:
    assert server.pids("bin/haproxy ")
    assert "Python proxy" not in server.output
    assert not other.pids("bin/haproxy ")
    assert "using Ray Serve's Python proxy" in other.output


def test_models_without_files_warn_and_stop_no_start(other: LaunchedServer) -> None:
    output = other.output
    assert output.count("warning: model absent cannot be loaded: /absent/model_config.json") == 1
    assert output.count("warning: model away cannot be loaded: lab/model is not complete in") == 1
    assert set(other.client.get("/health").json()["available_models"]) == {"tiny", "absent", "away"}


def test_dotenv_sets_the_limits(other: LaunchedServer) -> None:
    assert other.client.get("/health").json()["max_batch_size"] == 9


def test_python_proxy_keeps_deadlines_and_errors(other: LaunchedServer) -> None:
    client = other.client
    assert client.post("/generate", json=_LONG_BODY).status_code == 504
    refused = client.post("/generate", json=_BODY | {"model": "other"})
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "model"]
    assert client.post("/generate", json=_BODY | {"batch_size": 2}).headers["content-type"] == "application/zip"


def test_stopped_server_leaves_no_processes_and_spares_others(server: LaunchedServer, other: LaunchedServer) -> None:
    replicas = server.pids("ray::Serve")
    check_that_stopping_finishes_work(other, signal.SIGTERM)
    assert server.pids("ray::Serve") == replicas
    assert server.client.post("/generate", json=_BODY).status_code == 200


def run_to_failure(config: Path, *options: str, **variables: str) -> str:
    """Run a server that must fail to start. Return the error message, which must be one sentence."""
    (error,) = (line for line in failed_start(config, *options, **variables).splitlines() if line.startswith("error: "))
    return error


def failed_start(config: Path, *options: str, **variables: str) -> str:
    """Run a server that must fail to start. Return everything that it prints."""
    result = subprocess.run(
        command(config, *options),
        capture_output=True,
        text=True,
        cwd=config.parent,
        env=os.environ | {"PYTHONPATH": os.getcwd()} | variables,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr


def test_failed_start_of_ray_is_one_sentence(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_args())
    limits = ("RAY_gcs_server_port_wait_time_s", "RAY_NUM_REDIS_GET_RETRIES", "RAY_gcs_rpc_server_connect_timeout_s")
    with subprocess.Popen(
        command(config, "--port", str(free_port())),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()} | dict.fromkeys(limits, "2"),
    ) as launcher:
        freeze_child(launcher, "gcs_server")  # Ray's first process is frozen, as if it got no CPU time
        output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 2, output
    assert "Traceback" not in output
    (sentence,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert sentence.startswith("error: Ray did not start: ")
    assert "try again" in sentence


def freeze_child(parent: subprocess.Popen[str], name: str) -> None:
    """Wait until the process has a child of this name, and suspend the child."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while parent.poll() is None:
        for pid in children.read_text().split():
            with suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]:
                    os.kill(int(pid), signal.SIGSTOP)
                    return
        time.sleep(0.01)


def test_taken_port_stops_startup(server: LaunchedServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, make_args())
    assert f"port {server.port}" in run_to_failure(config, "--port", str(server.port))
    error = run_to_failure(config, "--port", str(free_port()), "--metrics-port", str(server.port))
    assert f"port {server.port}" in error
    assert "STABLE_AUDIO_METRICS_PORT" in error


def test_killed_processes_and_ctrl_c_leave_no_traceback(server: LaunchedServer) -> None:
    for name in ("ray::ServeReplica:audio:tiny", "ray::ServeReplica:audio:job-runner"):
        (pid,) = server.pids(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda name=name, pid=pid: set(server.pids(name)) - {pid})
    server.stop()
    assert server.process.returncode == 0
    check_log(server, since=0)


def test_stop_ends_although_ray_serves_controller_is_frozen(tmp_path: Path) -> None:
    launched = LaunchedServer(write_config(tmp_path, make_args(drain_s=1.0))).wait_until_ready()
    with launched.suspended("ray::ServeController"):
        launched.stop()
    assert launched.process.returncode == 0
    assert "does not answer: exiting" in launched.output
    wait_until(lambda: launched.leftovers() == [])


def test_config_fault_stops_startup_by_name(tmp_path: Path) -> None:
    """Tests one fault with a real process. `tests/cli/test_serving.py` tests other faults of the configuration."""
    config = write_config(tmp_path, make_args(), htpp_options={})
    assert "htpp_options" in run_to_failure(config, "--port", str(free_port()))


def test_weights_of_another_network_stop_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "model.safetensors")
    config = write_config(tmp_path, {"models": [{"name": "tiny", "path": str(folder)}]})
    once = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}  # Ray Serve tries only once to start the model
    output = failed_start(config, "--port", str(free_port()), "--proxy", "python", **once)
    # Lines of Ray may come before and after our error, but the error always starts on a new line.
    _, error = output.split("\nerror: ")
    assert f"model.safetensors: {min(load_file(Path(TINY) / 'model.safetensors'))} is missing" in error.splitlines()[0]


@pytest.mark.chaos
def test_unknown_haproxy_configuration_stops_startup(tmp_path: Path) -> None:
    program = tmp_path / "haproxy"
    program.write_text('#!/bin/sh\n[ "$1" = -v ] || { echo "error: not this one" >&2; exit 1; }\n')
    program.chmod(0o700)
    config = write_config(tmp_path, make_args())
    output = failed_start(config, "--port", str(free_port()), STABLE_AUDIO_PROXY_BINARY=str(program))
    assert output.split("\nerror: ")[1].splitlines()[0] == "not this one"
