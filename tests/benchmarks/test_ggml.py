"""The case `ggml` reads the times that sa3.cpp prints. In these tests, a script replaces sa3.cpp and our program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import ggml
from benchmarks.models import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine
from tests.factories import ToyModel

# Prints what sa3.cpp's sa3-generate prints. If it is called as Python, it prints what our own program prints. The shell
# runs the second line, which is text for Python, because the path in a first line must not have spaces.
STAND_IN = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
'''
import json, os, sys
if "-m" in sys.argv:
    print("a warning")
    *_, threads, clip_s = sys.argv
    assert threads == "2", sys.argv
    times = {{f"{{what}}, {{clip_s}} s (s)": 1.0 for what in ("step", "decode")}}
    print(json.dumps(times | {{"load (s)": 3.0}}))
elif os.environ["SA3_PROFILE"] == "1":
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    assert given["--model"] == "small-music" and given["--threads"] == "2", given
    seconds = int(given["--duration"])
    ms = {{"t5_total": 5, "conditioning": 10, "dit_total": 1000 * int(given["--steps"]), "dec_total": 100 * seconds}}
    ms |= {{"write_wav": 2, "total": sum(ms.values()) - 5 + 2 + 250}}
    for name, value in ms.items():
        print(f"[sa3-profile] {{name:<18}} {{value:8.3f}} ms", file=sys.stderr)
    print("wrote", given["--out"])
"""


def make_program(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


async def test_times_of_sa3_cpp_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = make_program(tmp_path, STAND_IN)
    monkeypatch.setattr(ggml.sys, "executable", program)
    monkeypatch.setattr(ggml, "has_native_bfloat16", lambda: False)
    results = await ggml.measure(CaseSettings(binary=program, weights=str(tmp_path), threads=2, rounds=1))
    theirs = results["sides"]["sa3.cpp F16"]
    assert theirs.pop("peak memory (GB)") > 0.001
    assert theirs == pytest.approx(
        {
            "load (s)": 0.25,
            "step, 12 s (s)": 1.0,
            "decode, 12 s (s)": 1.2,
            "step, 30 s (s)": 1.0,
            "decode, 30 s (s)": 3.0,
        }
    )
    (row,) = (row for row in ggml.rows(results) if row["figure"] == "decode, 30 s (s)")
    assert row == {"figure": "decode, 30 s (s)", "sa3.cpp F16": "3", "ours, float32": "1 (0.33x)"}


async def test_our_times_are_those_of_the_first_clip_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[GenerationRequest] = []

    class CountingEngine(Engine):
        async def generate(self, request: GenerationRequest, **options: Any) -> GenerationResult:
            generated.append(request)
            return await super().generate(request, **options)

    monkeypatch.setattr(ggml, "load_model", lambda *_, **__: ToyModel())
    monkeypatch.setattr(ggml, "Engine", CountingEngine)
    figures = await ggml._measure_ours("a folder", "small-music", dtype="float32", threads=1, clip_s=1)
    assert figures.keys() == {"load (s)", "step, 1 s (s)", "decode, 1 s (s)"}
    assert [request.duration_s for request in generated] == [1]


@pytest.mark.parametrize(
    ("text", "error"), [("#!/bin/sh\necho a song\n", "no times of .*: a song"), ("#!/bin/sh\nexit 3\n", "status 3")]
)
async def test_another_program_is_refused(tmp_path: Path, text: str, error: str) -> None:
    program = make_program(tmp_path, text)
    with pytest.raises(ValueError, match=error):
        await ggml.measure(CaseSettings(binary=program, weights=str(tmp_path), rounds=1))
