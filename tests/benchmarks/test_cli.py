"""Options of `python -m benchmarks`: what a case does not follow is refused by name, what it follows counts."""

from __future__ import annotations

import ast
import importlib
import inspect
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import bench, cli
from benchmarks.cases.engine import run_engine_case
from benchmarks.registry import CASES
from benchmarks.settings import CaseSettings

ROOT = Path(__file__).parents[2]
SETTINGS = {field.name for field in fields(CaseSettings)}


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("simulate --rounds 2", "simulate does not use --rounds"),
        ("memory --rounds 2", "memory does not use --rounds"),
        ("jobs --threads 2", "jobs does not use --threads"),
        ("http --mode fast", "http does not use --mode"),
        ("formats --device cuda", "formats does not use --device"),
        ("open --model demo", "open does not use --model"),
        ("http --engine-only", "http does not use --engine-only"),
        ("ladder --count 3", "ladder does not use --count"),
        ("bench --mix demo-fast", "bench does not use --mix"),
        ("bench --engine-only", "bench does not use --engine-only"),
        ("all --against lock,ours", "all does not use --against"),
        ("run --dialect fal", "run does not use --dialect without --url"),
        ("run --url-key secret --against lock,ours", "run does not use --url-key without --url"),
        ("run --device cuda", "run does not use --device without --engine-only"),
        ("run --url http://host --mode fast", "run does not use --mode without --against"),
        ("run --rounds 0", "less than 1"),
        ("run --count x", "x is no number"),
        ("run --goodput-trials -1", "-1 is no number"),
        ("run --attempts 2", "--attempts"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(
    command: str, refused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(command.split())
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run --against lock,lock", "named twice"),
        ("run --mix demo-fast --url http://127.0.0.1:9", "url failed: Cannot connect"),
        ("run --model nothing-known --engine-only", "'nothing-known' is not built in"),
        ("run --device cuda:99 --engine-only --model stable_audio_serve/demo/checkpoint", "cuda:99"),
        ("ladder --model nothing-known", "'nothing-known' is not built in"),
        ("simulate --out setup-is/pyproject.toml/below", "pyproject.toml"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command.replace("setup-is/", f"{ROOT}/").split()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path)])
    assert told in str(raised.value.code)
    assert "\n" not in str(raised.value.code)


@pytest.mark.parametrize(
    ("command", "rounds"),
    [("bench", (2, 1)), ("bench --full", (3, 3)), ("bench --rounds 5", (5, 5)), ("bench --full --rounds 1", (1, 1))],
)
def test_rounds_given_to_bench_count(
    command: str, rounds: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, measured = set(), set()
    monkeypatch.setattr(
        bench, "measure_comparison", lambda settings, request, *, out: compared.add(settings.rounds) or []
    )
    monkeypatch.setattr(bench, "measure_case", lambda name, settings, *, out: measured.add(settings.rounds) or [])
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--out", str(tmp_path)])
    assert (compared, measured) == ({rounds[0]}, {rounds[1]})


@pytest.mark.parametrize("name", CASES)
def test_a_case_follows_the_options_it_names(name: str) -> None:
    module = importlib.import_module(f"benchmarks.cases.{CASES[name].module}")
    source = inspect.getsource(module)
    followed = read_settings(source)
    if "run_engine_case(" in source:
        followed |= read_settings(inspect.getsource(run_engine_case))
    if " load(settings)" in source or "(load(settings)" in source:
        followed |= {"model", "device"}
    assert followed == set(CASES[name].options.split())


def read_settings(source: str) -> set[str]:
    """Returns the fields that code reads of something called `settings`."""
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {
        node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "settings"
    } & SETTINGS
