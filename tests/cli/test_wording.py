"""Error messages of commands name options, not fields of the API, and give plain reasons. Help texts fit a terminal."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stable_audio_serve.api.native.schemas import GenerationBody
from stable_audio_serve.cli import app, remote
from stable_audio_serve.cli.messages import OPTIONS, describe_os_error, in_options
from stable_audio_serve.cli.sound_options import SoundOptions
from stable_audio_serve.client.failures import Attempts
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.launch import _ready_text
from tests.patience import PATIENCE_S

CLOSED_URL = "http://127.0.0.1:9"  # no server listens on this port


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_fits_80_columns(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    assert "<bool>" not in result.output
    usage, *lines = result.output.splitlines()
    assert "}...}" not in usage
    assert [line for line in lines if line.endswith("...") or len(line) > 80] == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("duration: duration must be at most 120 (the model x)", "--duration must be at most 120 (the model x)"),
        ("steps: Input should be greater than or equal to 1", "--steps must be greater than or equal to 1"),
        (
            "cfg_scale: Input should be less than or equal to 20; batch_size: batch_size must be at most 4 (api.x_y)",
            "--cfg-scale must be less than or equal to 20; --variations must be at most 4 (api.x_y)",
        ),
        ("prompt: String should have at least 1 character", "PROMPT must not be empty"),
        (
            "sampler_kwargs: sampler_kwargs.sampler_type must be one of euler, rk4 for the model demo",
            "--sampler must be one of euler, rk4 for the model demo",
        ),
        ("audio: the uploaded file is empty", "AUDIO: the uploaded file is empty"),
        ("loras: loras: the model demo has no adapter 'x'", "--lora: the model demo has no adapter 'x'"),
        (
            "strength: Input should be less than or equal to 2",
            "the strength of --lora must be less than or equal to 2",
        ),
        (
            "sections.1.duration: sections.1.duration must be from 1 to 3: with overlap_s (2) at most 5",
            "the length of --section 2 must be from 1 to 3: with --overlap (2) at most 5",
        ),
        ("sections.0.prompt: String should have at least 1 character", "the prompt of --section 1 must not be empty"),
        ("the model is not ready, the prompt is fine", "the model is not ready, the prompt is fine"),
        ("bars: bars must be set with bpm", "--bars must be set with --bpm"),
        ("bpm: bpm must be set with bars", "--bpm must be set with --bars"),
        ("loop: loop must be true with bpm and bars", "--loop must be true with --bpm and --bars"),
        (
            "audio: audio: upload the source files of the recipe; missing SHA-256: 0a",
            "AUDIO: name the source files of the recipe with --source; missing SHA-256: 0a",
        ),
    ],
)
def test_errors_name_options_instead_of_api_fields(message: str, expected: str) -> None:
    assert in_options(message) == expected


def test_every_control_maps_to_an_option() -> None:
    assert set(SoundOptions().controls) <= set(OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["variation", "nope.wav", "rain"], "error: nope.wav: file not found\n"),
        (["replay", "."], "error: .: is a directory\n"),
        (["generate", "rain", "--key-file", "nope"], "error: --key-file: nope: file not found\n"),
        (["inpaint", "nope.wav", "rain", "-r", "3:2"], "error: --region 3:2: the start must be before the end\n"),
        (
            ["models", "--url", "nowhere"],
            "error: 'nowhere' is not the URL of a server, such as http://127.0.0.1:8000\n",
        ),
        (["generate", "rain", "--loudness", "nan"], "error: --loudness must be finite\n"),
        (["generate", "rain", "--section", "inf"], "error: --section must be finite\n"),
        (["generate", "rain", "--true-peak", "-1"], "error: --true-peak needs --loudness\n"),
        (
            ["jobs", "submit", "rain", "--audio", "x.wav", "--loop"],
            "error: --loop, --bpm, --bars and --section are for prompts without --audio\n",
        ),
        (["extend", "x.wav", "rain"], "error: set --before or --after to the seconds of new audio\n"),
        (["jobs", "submit", "rain", "--after", "2"], "error: --region, --before, --after and --noise need --audio\n"),
    ],
)
def test_mistakes_are_reported_plainly(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (2, expected)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("http_proxy", "::::", "the proxy set in the environment: Invalid port"),
        ("SSL_CERT_FILE", "/nope", "SSL_CERT_FILE: file not found"),
    ],
)
def test_unusable_network_variables_are_named(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(app, ["models", "--url", CLOSED_URL])
    assert result.exit_code == 2
    assert re.match(f"error: {expected}", result.stderr)


def test_a_prompt_in_another_encoding_is_refused() -> None:
    result = CliRunner().invoke(app, ["generate", "-"], input="rain".encode("utf-16"))
    assert (result.exit_code, result.stderr) == (2, "error: the prompt on standard input is not UTF-8 text\n")


@pytest.mark.parametrize("command", ["generate", "variation", "inpaint"])
def test_help_has_the_default_length(command: str) -> None:
    default_s = GenerationBody.model_fields["duration"].default
    assert f"Length, seconds; default: {default_s:g}." in CliRunner().invoke(app, [command, "--help"]).stdout


def test_system_errors_are_described_in_words() -> None:
    assert describe_os_error(PermissionError(13, "Permission denied", "x")) == "x: permission denied"
    assert describe_os_error(OSError("there are too many files")) == "there are too many files"


@pytest.mark.parametrize(("command", "num_messages"), [(["keys", "new"], 1), (["config"], 1), (["--help"], 0)])
def test_a_full_disk_ends_a_command_with_a_sentence(command: list[str], num_messages: int, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "stable_audio_serve.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
            check=False,
        )
    assert (ended.returncode, ended.stderr.splitlines()[num_messages:]) == (2, [b"error: no space left on device"])


def test_an_unreachable_server_fails_within_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s: list[float] = []
    find_pause_s = Attempts.pause_s

    def pause_s(attempts: Attempts, failure: StableAudioError) -> float:
        pauses_s.append(find_pause_s(attempts, failure))
        return 0.0

    monkeypatch.setattr(Attempts, "pause_s", pause_s)
    monkeypatch.setattr(remote, "_SILENT_S", PATIENCE_S)  # otherwise a line about it may come on a busy machine
    result = CliRunner().invoke(app, ["generate", "rain", "--url", CLOSED_URL])
    assert sum(pauses_s) < 5
    first, second, last = result.stderr.splitlines()
    assert first.startswith(f"the server {CLOSED_URL} did not answer: Connection refused; trying again in ")
    assert second.startswith(first[:70])
    assert last == f"error: the server {CLOSED_URL} did not answer: Connection refused"
    assert result.exit_code == 3


@pytest.mark.parametrize("login", ["", "me:secret@"])
def test_a_hanging_server_is_named_while_the_command_waits(login: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENT_S", 0.1)
    monkeypatch.setattr(remote, "_TIMEOUT_S", 2.0)  # so much longer that the line comes first on a busy machine, too
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        result = CliRunner().invoke(app, ["status", "--url", url.replace("//", f"//{login}")])
    waiting, error = result.stderr.splitlines()
    assert waiting == f"waiting for the server {url}/"
    assert error.startswith(f"error: the server {url} did not answer")


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert remote._read_key(file) == "secret"


def test_the_first_line_appears_within_two_seconds() -> None:
    assert remote._SILENT_S < 2


def test_a_quiet_command_prints_its_error_only() -> None:
    result = CliRunner().invoke(app, ["generate", "rain", "--url", CLOSED_URL, "--quiet"])
    assert result.stderr == f"error: the server {CLOSED_URL} did not answer: Connection refused{os.linesep}"


def test_the_ready_line_names_the_page() -> None:
    text = _ready_text("http://127.0.0.1:8000", SimpleNamespace(names=["demo"], settings=Settings()))  # type: ignore[arg-type]
    assert text.startswith("ready: http://127.0.0.1:8000 serves demo")
    assert "Open http://127.0.0.1:8000/ in a browser" in text
