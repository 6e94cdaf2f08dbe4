"""The text that `status` prints about a server, from complete and from partial answers of the server."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from stable_audio_serve.api.app import create_app
from stable_audio_serve.cli import admin, app, tables
from stable_audio_serve.core.settings import Settings
from tests.backends import ToneBackend

HOSTILE = "\x1b]0;owned\x07\x1b[31mred [bold]b[/bold]\r\nnext"


def example() -> dict[str, Any]:
    replica = {"id": "a1", "device": "cuda:0", "dtype": "bfloat16", "requests": 3, "backlog_s": 1.26, "age_s": 0.4}
    return {
        "server": "stable-audio-serve",
        "version": "1.2",
        "status": "draining",
        "ready": False,
        "reasons": ["an operator is taking this server out"],
        "draining": {"state": "draining", "requests": 2, "jobs": None},
        "backlog_s": 1.26,
        "models": {
            "medium": {
                "stage": "ready",
                "default": True,
                "kept": True,
                "min_replicas": 0,
                "max_replicas": 4,
                "states": {"running": 1, "starting": 2},
                "backlog_s": 1.26,
                "rows_per_step": 6.04,
                "requests_per_minute": 1234,
                "waiting_jobs_s": 432.1,
                "replicas": [replica | {"rows_per_step": 6.04}, {"id": "b2", "age_s": 9.0}],
            }
        },
        "jobs": {
            "store": {"state": "unavailable", "reason": "the database is away"},
            "queued": 12,
            "running": None,
            "dead_letters": 4,
            "waited_s": 61.0,
            "reason": "the database is away",
        },
        "age_s": 0.2,
        "reason": "Ray Serve's controller does not answer",
    }


def answering(body: str) -> httpx.MockTransport:
    return httpx.MockTransport(lambda _: httpx.Response(200, text=body))


def shown(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    tables.print_status(found)
    return capsys.readouterr().out


def test_status_shows_everything_an_operator_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(example(), capsys)
    words = ("medium *", "1 running, 2 starting", "0-4", "yes", "1.3 s", "6.0", "cuda:0", "bfloat16", "9.0 s ago")
    words += ("1234", "432.1 s")
    words += ("2 requests and ? jobs left", "12 queued", "? running", "4 dead letters", "has waited 61.0 s")
    words += ("an operator is taking this server out", "controller does not answer")
    assert [word for word in words if word not in text] == []
    assert text.count("the database is away") == 1


@pytest.mark.parametrize("left_out", [*example(), None])
def test_status_of_another_server_version_is_shown(left_out: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    found = {key: value for key, value in example().items() if key != left_out} if left_out else {}
    assert "Jobs:" in shown(found, capsys)


@pytest.mark.parametrize("answer", ["[]", "null", '"ready"', '{"models": [1]}', '{"jobs": ["x"]}', "[" * 100_000])
@pytest.mark.parametrize(
    "arguments", [["status"], ["admin", "load", "m"], ["admin", "drain"], ["admin", "dead-letters"], ["models"]]
)
def test_an_answer_of_another_server_is_a_plain_error(
    arguments: list[str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=answering(answer)))
    result = CliRunner().invoke(app, [*arguments, "--url", "http://a"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the server's answer cannot be understood: ")


def test_drain_ends_if_a_load_balancer_answers_for_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(202, json={"state": "draining", "requests": 1, "jobs": 0})
        return httpx.Response(200, json={"draining": {"state": "no", "requests": 0, "jobs": 0}})

    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(admin, "_SPREAD_S", 0.0)
    result = CliRunner().invoke(app, ["admin", "drain", "--wait", "3", "--url", "http://balancer"])
    assert (result.exit_code, result.stdout) == (2, "1 requests and 0 jobs are left to finish\n")
    assert "--url" in result.stderr


def test_a_server_that_does_not_say_it_is_ready_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=answering("{}")))
    result = CliRunner().invoke(app, ["status", "--url", "http://a"])
    assert (result.exit_code, result.stderr) == (1, "")
    assert "Jobs: ? queued" in result.stdout


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = example() | {"reasons": [HOSTILE], "version": HOSTILE}
    found["models"] = {HOSTILE: found["models"]["medium"] | {"states": {HOSTILE: 1}, "replicas": [{"id": HOSTILE}]}}
    letter = {"number": 1, "id": HOSTILE, "contract": "sa3", "client": HOSTILE, "model": "m", "failed_at": None}
    letter |= {"attempts": 3, "error": {"code": "x", "message": HOSTILE}, "prompt": HOSTILE}
    text = shown(found, capsys)
    tables.print_dead_letters([letter])
    event = {"at": HOSTILE, "stage": HOSTILE, "fraction": 0.5, "message": HOSTILE}
    tables.print_details(letter | {"events": [event]})
    text += capsys.readouterr().out
    assert "owned" in text
    assert "[bold]" in text
    assert not {"\x1b", "\x07", "\r"} & set(text)


def test_watching_without_a_terminal_appends_each_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tables.live_status() as show:
        show(example())
        show({"error": "the server did not answer"})
    text = capsys.readouterr().out
    assert text.index("medium *") < text.index("did not answer")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--retry"],
        ["--delete"],
        ["1", "--retry", "--all"],
        ["1", "--delete", "--model", "m"],
        ["--retry", "--", "-1"],
        ["1", "--retry", "--delete"],
        ["--all"],
    ],
)
def test_dead_letters_refuses_contradictory_arguments(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["admin", "dead-letters", *arguments])
    assert result.exit_code == 2, result.output


def test_keys_are_read_from_a_file_and_not_from_an_option() -> None:
    for command in (["status"], ["admin", "drain"]):
        help_text = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
        assert "--key-file" in help_text
        assert "--key " not in help_text


def test_the_openapi_schema_has_the_admin_routes() -> None:
    paths = create_app(ToneBackend(), Settings()).openapi()["paths"]
    admin = {path for path in paths if path.startswith("/v1/admin/")}
    assert {"/v1/admin/drain", "/v1/admin/models/{model}/load", "/v1/admin/models/{model}/unload"} < admin
