"""The option `--lora` and the commands `loras`, with a fake server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stable_audio_serve.cli import app, remote
from tests.patience import PATIENCE_S

HASH = "0123456789abcdef" * 4
LISTED = {
    "data": [
        {"id": "medium"},
        {"id": "medium:vinyl", "parent": "medium", "type": "dora-rows", "rank": 16, "sha256": HASH},
    ]
}
REFUSAL = {"detail": [{"loc": ["body", "loras"], "msg": "loras: the adapter 'vinly' is unknown; did you mean vinyl?"}]}
JOB_ROUTES = ("/jobs", "/jobs/variations", "/jobs/inpaint")


class Server(ThreadingHTTPServer):
    """A fake server that records requests. `answers` maps a path to a status and a text; unlisted paths get 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, str]] = {
            "/v1/models": (200, json.dumps(LISTED)),
            **dict.fromkeys(JOB_ROUTES, (422, json.dumps(REFUSAL))),
        }
        self.requests: list[tuple[str, str]] = []

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command that must exit with `code`. Returns what it prints."""
        ended = CliRunner().invoke(app, [*arguments, "--url", f"http://127.0.0.1:{self.server_port}"])
        assert ended.exit_code == code, ended.output
        return ended.output

    @property
    def last(self) -> tuple[str, Any]:
        """Path and fields of the last request."""
        path, body = self.requests[-1]
        return path, json.loads(body)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, body.decode(errors="replace")))
        status, text = self.server.answers.get(self.path, (404, '{"detail": "unknown"}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "_SILENT_S", PATIENCE_S)  # otherwise a line about a slow server may come
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", [["generate"], ["jobs", "submit"]])
def test_adapters_are_sent_in_their_order(server: Server, command: list[str]) -> None:
    adapters = ["--lora", "vinyl:0.8", "--lora", "bells", "--lora", "tape:-1"]
    error = server.run(*command, "rain", *adapters, "--lora-stacking", "summed", code=2)
    assert "--lora: the adapter 'vinly' is unknown; did you mean vinyl?" in error
    path, fields = server.last
    assert path == "/jobs"
    assert fields["loras"] == [
        {"name": "vinyl", "strength": 0.8},
        {"name": "bells"},
        {"name": "tape", "strength": -1.0},
    ]
    assert fields["lora_stacking"] == "summed"


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["variation", "a.wav", "rain"], "/jobs/variations"),
        (["inpaint", "a.wav", "rain", "-r", "0:1"], "/jobs/inpaint"),
        (["extend", "a.wav", "rain", "--after", "2"], "/jobs/inpaint"),
        (["jobs", "submit", "rain", "--audio", "a.wav"], "/jobs/variations"),
    ],
)
def test_adapters_are_sent_with_source_audio(server: Server, command: list[str], path: str) -> None:
    Path("a.wav").write_bytes(b"RIFF")
    server.run(*command, "--lora", "vinyl:0.5", code=2)
    sent, body = server.requests[-1]
    assert sent == path
    assert '[{"name": "vinyl", "strength": 0.5}]' in body


@pytest.mark.parametrize("text", ["vinyl:loud", "vinyl:", ":0.5", "vinyl:nan", "vinyl:inf", "vinyl:0.5:x"])
def test_strength_that_is_no_number_is_refused(server: Server, text: str) -> None:
    error = server.run("generate", "rain", "--lora", text, code=2)
    assert error == f"error: --lora: {text!r} is not NAME or NAME:STRENGTH, such as vinyl:0.8\n"
    assert server.requests == []


@pytest.mark.parametrize("command", [["loop", "techno 120bpm"], ["replay", "a.wav"]])
def test_commands_without_adapters_refuse_the_option(server: Server, command: list[str]) -> None:
    assert "No such option: --lora" in server.run(*command, "--lora", "vinyl", code=2)


def test_adapters_are_listed(server: Server) -> None:
    heading, _, row = server.run("loras", "list").strip().splitlines()
    assert heading.split() == ["Adapter", "Model", "Type", "Rank", "SHA-256"]
    assert row.split() == ["vinyl", "medium", "dora-rows", "16", "0123456789ab"]
    assert json.loads(server.run("loras", "list", "--json")) == LISTED["data"][1:]
    server.answers["/v1/models"] = (200, '{"data": []}')
    assert server.run("loras", "list") == "no adapters\n"


def test_adapter_is_loaded_and_unloaded(server: Server) -> None:
    server.answers["/v1/load_lora_adapter"] = (200, "Success")
    server.answers["/v1/unload_lora_adapter"] = (200, "Success")
    assert server.run("loras", "load", "vinyl", "owner/repository", "-m", "medium") == "vinyl: loaded\n"
    fields = {"lora_name": "vinyl", "lora_path": "owner/repository", "model": "medium"}
    assert server.last == ("/v1/load_lora_adapter", fields)
    assert server.run("loras", "unload", "vinyl") == "vinyl: unloaded\n"
    assert server.last == ("/v1/unload_lora_adapter", {"lora_name": "vinyl", "model": None})


@pytest.mark.parametrize(
    ("status", "code", "message", "expected"),
    [
        (400, 2, "lora_path: there is no such file", "error: PATH: there is no such file"),
        (404, 2, "no adapter named vinyl", "error: no adapter named vinyl"),
        (403, 4, "the key lacks the scope admin", "error: the key lacks the scope admin"),
    ],
)
def test_refused_load_sets_the_exit_code(
    server: Server, status: int, code: int, *, message: str, expected: str
) -> None:
    server.answers["/v1/load_lora_adapter"] = (status, json.dumps({"detail": message}))
    assert server.run("loras", "load", "vinyl", "x", code=code).strip() == expected
