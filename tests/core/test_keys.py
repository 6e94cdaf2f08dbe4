"""API keys and the key file: their text form, and the commands that create and check them."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stable_audio_serve.cli.main import app
from stable_audio_serve.core.keys import (
    DEFAULT_SCOPES,
    SCOPES,
    ApiKey,
    KeyLimits,
    format_key,
    hash_key,
    merge_keys,
    parse_key,
    parse_key_file,
    parse_key_hash,
    read_key_file,
)

ONE, TWO, THREE = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two", b"three"))


def test_a_line_may_hold_name_scopes_and_limits_in_any_order() -> None:
    assert parse_key(ONE) == ApiKey(ONE[:16], ONE)  # type: ignore[arg-type]
    key = parse_key(f"alice:{ONE}  concurrency=4\tscope=admin,jobs audio-seconds-per-minute=600.5")
    assert (key.client, key.digest, key.scopes) == ("alice", ONE, {"admin", "jobs"})
    assert key.limits == KeyLimits(600.5, 4)
    assert parse_key(f"alice:{ONE}").scopes == {"generate", "jobs"}
    assert (key.label, parse_key(ONE).label) == ("alice", "unnamed")


@given(
    st.frozensets(st.sampled_from(SCOPES), min_size=1),
    st.none() | st.integers(1, 10**6).map(float),
    st.none() | st.integers(1, 10**6),
)
def test_a_written_line_is_read_back(scopes: frozenset[str], rate: float | None, concurrency: int | None) -> None:
    key = ApiKey("a.b_C-9", ONE, scopes, KeyLimits(rate, concurrency))  # type: ignore[arg-type]
    assert parse_key(format_key(key)) == key
    many = replace(key, limits=replace(key.limits, audio_seconds_per_minute=1_234_567.0))
    assert parse_key(format_key(many)) == many


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("sas-this-is-a-plain-key", "SHA-256"),
        ("alice:sas-this-is-a-plain-key", "SHA-256"),
        (f"alice:{ONE} sas-this-is-a-plain-key", "word 2 must be one of"),
        (f"alice:{ONE} scope=sas-this-is-a-plain-key", "scope must be"),
        (f"alice:{ONE} scope=", "scope must be"),
        (f"alice:{ONE} scope=Admin", "scope must be"),
        (f"alice:{ONE} scope=jobs scope=admin", "scope appears twice"),
        (f"alice:{ONE} rights=admin", "word 2"),
        *(
            (f"alice:{ONE} audio-seconds-per-minute={value}", "a number from 1")
            for value in ("0", "-1", "nan", "inf", "x")
        ),
        *((f"alice:{ONE} concurrency={value}", "a whole number") for value in ("0", "-1", "1.5", "٣", "1" * 5000)),
        (f"al\x1bice:{ONE}", "64 letters"),
        (f"al\x00ice:{ONE}", "64 letters"),
        (f"ali\u202ece:{ONE}", "64 letters"),
        (f"{'a' * 16}:{ONE}", "16 hexadecimal digits"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_not_shown(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_key_file(f"# of us\n\nbob:{TWO}\n{line}\n".encode())
    assert str(caught.value).startswith("line 4: ")
    assert not re.search(r"plain|sas-|[^ -~]|[0-9a-f]{20}", str(caught.value))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"\x00" * 100, "line 1"),
        (f"a:{ONE}\nb:{ONE}\n".encode(), "lines 1 and 2 are the same key"),
        (
            f"a:{ONE} concurrency=1\nb:{TWO}\na:{THREE}\n".encode(),
            "lines 1 and 3 set different limits for the same name",
        ),
    ],
)
def test_an_ambiguous_key_file_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_key_file(data)


def test_comments_empty_lines_and_a_byte_order_mark_are_ignored() -> None:
    assert parse_key_file(b"# nobody\n") == ()
    keys = parse_key_file(f"\ufeffalice:{ONE} # hers\r\n\r\n   # none\r\n\tbob:{TWO} scope=admin\r\n".encode())
    assert [(key.client, sorted(key.scopes)) for key in keys] == [("alice", sorted(DEFAULT_SCOPES)), ("bob", ["admin"])]


def test_a_path_that_is_not_a_key_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading the pipe would block forever, because nothing writes to it
    with pytest.raises(ValueError, match="not a regular file"):
        read_key_file(str(tmp_path / "pipe"))
    with pytest.raises(OSError, match="directory"):
        read_key_file(str(tmp_path))
    (tmp_path / "large").write_bytes(b"#" * 16_777_217)
    with pytest.raises(ValueError, match="larger"):
        read_key_file(str(tmp_path / "large"))


def test_ten_thousand_keys_are_read() -> None:
    lines = [f"client-{number}:{hash_key(str(number))} concurrency={number + 1}" for number in range(10_000)]
    keys = parse_key_file("\n".join(lines).encode())
    assert (len(keys), keys[-1].client, keys[-1].limits.concurrency) == (10_000, "client-9999", 10_000)


def test_limits_in_the_file_apply_to_all_keys_of_a_name() -> None:
    configured = [parse_key_hash(text) for text in (f"alice:{ONE}", f"bob:{TWO}", THREE)]
    merged = merge_keys(configured, parse_key_file(f"alice:{'0' * 64} concurrency=2\nbob:{TWO} scope=admin\n".encode()))
    assert {key.client for key in merged.values()} == {"alice", "bob", THREE[:16]}
    assert (merged[ONE].limits.concurrency, merged["0" * 64].limits.concurrency) == (2, 2)
    assert merged[TWO].scopes == {"admin"}


def test_the_command_prints_the_file_line_and_the_key_separately(tmp_path: Path) -> None:
    options = ["--scope", "admin", "--scope", "jobs", "--audio-seconds-per-minute", "600", "--concurrency", "4"]
    result = CliRunner().invoke(app, ["keys", "new", "alice", *options])
    assert result.stderr.startswith("key of alice: ")
    key = result.stderr.split()[-1]
    assert len(key) > 40
    assert result.stdout == f"alice:{hash_key(key)} scope=jobs,admin audio-seconds-per-minute=600 concurrency=4\n"
    (tmp_path / "keys").write_text(result.stdout + CliRunner().invoke(app, ["keys", "new"]).stdout)
    checked = CliRunner().invoke(app, ["keys", "check", str(tmp_path / "keys")])
    assert checked.stdout.splitlines()[0] == "alice\tjobs,admin\t600 audio seconds per minute, 4 at a time"
    assert re.fullmatch(r"[0-9a-f]{16}\tgenerate,jobs\tno limits", checked.stdout.splitlines()[1])


@pytest.mark.parametrize("arguments", [["a b"], [""], ["-x"], ["a", "--scope", "root"], ["a", "--concurrency", "0"]])
def test_the_command_refuses_keys_that_the_server_refuses(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["keys", "new", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_the_check_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice:{ONE}\nsas-this-is-a-plain-key\n")
    result = CliRunner().invoke(app, ["keys", "check", str(tmp_path / "keys")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "line 2: must be the SHA-256" in result.stderr
    assert "plain" not in result.stderr
    assert CliRunner().invoke(app, ["keys", "check", str(tmp_path / "missing")]).exit_code == 2
