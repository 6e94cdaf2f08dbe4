"""All commands have the same exit code for the same fault."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from stable_audio_serve.cli.makers import SoundRequest, make_by_server
from stable_audio_serve.cli.messages import ExitCode, plain_errors
from stable_audio_serve.cli.remote import connected
from stable_audio_serve.core import errors
from stable_audio_serve.serving import engines

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


def as_sound_does(error: Exception) -> None:
    with plain_errors():
        raise error


def as_operators_do(error: Exception) -> None:
    with connected("http://127.0.0.1:9", None):
        raise error


@pytest.mark.parametrize("end", [as_sound_does, as_operators_do])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StorageError("the disk is full"), 1),
        (errors.InvalidRequestError("steps: at most 100", field="steps"), 2),
        (errors.NotFoundError("no such job"), 2),
        (ValueError("--url: no address"), 2),
        (errors.UnreachableError("nobody answers"), 3),
        (errors.UnauthorizedError("a key is required"), 4),
        (errors.ForbiddenError("not with this key"), 4),
        (errors.OverloadedError("full"), 5),
        (errors.QuotaError("used up"), 5),
        (errors.DeadlineExceededError("too late"), 6),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_has_the_same_exit_code_in_every_command(
    end: Callable[[BaseException], None], error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        end(error)
    assert ended.value.exit_code == code
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert ("STABLE_AUDIO_API_KEY" in output) is isinstance(error, errors.UnauthorizedError)


def test_a_lost_server_leaves_the_name_of_the_job() -> None:
    jobs = Mock()
    jobs.submit.return_value.id = "0123456789abcdef"
    jobs.wait.side_effect = errors.NotConnectedError("refused")
    with pytest.raises(errors.NotConnectedError) as lost:
        make_by_server(SoundRequest("generate", "rain"), Mock(jobs=jobs), connect=Mock(), on_progress=print)
    assert lost.value.message.startswith("refused; ")
    assert "jobs fetch 0123456789abcdef" in lost.value.message


def test_the_docs_list_every_exit_code() -> None:
    table = PAGE.read_text().partition("## Exit codes")[2]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == [*ExitCode]


@pytest.mark.server
@pytest.mark.slow
def test_ctrl_c_ends_the_loading_of_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_loaded = False

    def load(*_: object) -> None:
        nonlocal is_loaded
        signal.raise_signal(signal.SIGINT)
        is_loaded = True

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "load_named_engine", load)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(app, ["generate", "rain", "--local", "-q"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stderr, is_loaded) == (130, "error: interrupted\n", False)
