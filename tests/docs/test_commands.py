"""Every ```bash block of the docs runs unchanged, with a test server. The blocks of a page run as one script."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.compat import aimlapi, elevenlabs, fal, stability, vllm_omni
from stable_audio_serve.api.compat.stable_audio_open_small import routes as open_small
from stable_audio_serve.api.middleware.limits import MAX_FIELDS_BYTES, ClientTimes
from stable_audio_serve.api.native import job_routes as native_jobs
from stable_audio_serve.api.native import routes as native
from stable_audio_serve.api.shared_routes import files, merged, server
from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.audio.workers import MAX_SOURCE_BYTES
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_models import ModelSettings, ReplicaSettings
from stable_audio_serve.core.settings_sources import VARIABLES
from tests.api.compat.serving import serve_app
from tests.audio_files import make_audio_file
from tests.backends import RATE_HZ, ToneBackend
from tests.docs.blocks import DOCS, ROOT, all_blocks, pages, text_of
from tests.patience import PATIENCE_S

DIALECTS = DOCS / "dialects"

# Page -> the tags of the API operations that the commands on the page must call.
TAGS: dict[str, set[str]] = {
    "clients.md": set(),
    "jobs.md": {native_jobs.TAG},
    "security.md": set(),
    "tutorial.md": set(),
    "dialects/aimlapi.md": {aimlapi.TAG},
    "dialects/stability.md": {stability.TAG},
    "dialects/elevenlabs.md": {elevenlabs.TAG},
    "dialects/fal.md": {fal.TAG, files.TAG},
    "dialects/stable-audio-3.md": {native.TAG, merged.TAG, server.TAG},
    "dialects/stable-audio-open-small.md": {open_small.TAG, merged.TAG},
    "dialects/vllm-omni.md": {vllm_omni.TAG, server.TAG},
}


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a page's commands. `calls` are their requests as METHOD and path. They write files to `folder`."""

    output: str
    calls: list[str]
    backend: ToneBackend
    folder: Path

    def has_called(self, operation: str) -> bool:
        """Whether a command called an operation, given as METHOD and path.

        In the path, `{name}` matches any segment, and `{endpoint}` matches several segments.
        """
        pattern = re.sub(r"\\{endpoint(?:_id)?\\}", ".+", re.escape(operation))
        pattern = re.sub(r"\\{[a-z_]+\\}", "[^/]+", pattern)
        return any(re.fullmatch(pattern, call) for call in self.calls)

    def named(self, pattern: str) -> list[str]:
        """Returns the names of the written files that match a pattern. Some names contain a random seed."""
        return [path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern)]

    def frames(self, name: str) -> int:
        """Returns the number of samples per channel of a written file.

        Checks that the file is Opus, or 16-bit stereo at the model's sample rate.
        """
        info = soundfile.info(self.folder / name)
        if info.subtype != "OPUS":
            assert (info.subtype, info.samplerate, info.channels) == ("PCM_16", RATE_HZ, 2)
        return info.frames


async def run_page(page: Path, folder: Path, **settings: Any) -> Run:
    commands = text_of(page, "bash")
    (folder / ".curlrc").write_text('write-out = "%{stderr}%{method} %{url_effective}\\n"')
    async with serve_app(**settings) as (port, backend):
        address = f"127.0.0.1:{port}"
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-euo",
            "pipefail",
            "-c",
            re.sub(r"(localhost|127\.0\.0\.1):8000/", f"{address}/", commands),
            cwd=folder,
            env={
                "BASE": f"http://{address}",
                "CURL_HOME": str(folder),
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "STABLE_AUDIO_URL": f"http://{address}",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE_S):
            output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    calls = re.findall(rf"^([A-Z]+) (?:http://)?{address}(/[^?\n]*)", errors.decode(), flags=re.MULTILINE)
    return Run(output.decode(), [" ".join(call) for call in calls], backend, folder)


@pytest.fixture(scope="module")
def operations() -> dict[str, set[str]]:
    """Returns METHOD and path of every operation in the OpenAPI description, by tag."""
    found: dict[str, set[str]] = {}
    for path, operations in create_app(ToneBackend(), Settings()).openapi()["paths"].items():
        for method, operation in operations.items():
            if path == "/api/fal/proxy" and method not in ("get", "post", "put"):
                continue  # this route accepts every method, and the page needs to show only one
            found.setdefault(operation["tags"][0], set()).add(f"{method.upper()} {path}")
    return found


def expect_complete(run: Run, page: str, operations: dict[str, set[str]]) -> None:
    """Assert that the page's commands called every operation that has one of the page's tags in `TAGS`."""
    wanted = set().union(*(operations[tag] for tag in TAGS[page]))
    assert not [operation for operation in wanted if not run.has_called(operation)]


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_stable_audio_3_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "stable-audio-3.md", tmp_path)
    expect_complete(run, "dialects/stable-audio-3.md", operations)
    assert run.has_called("GET /jobs/{job_id}/audio")
    names = {"tone.wav": 3, "chord.wav": 3, "variation.wav": 3, "longer.wav": 5, "kick.wav": 2}
    assert {name: run.frames(name) for name in names} == {name: seconds * RATE_HZ for name, seconds in names.items()}
    assert run.output.count('"status":"queued"') == 2
    assert '"status":"succeeded"' in run.output
    assert '"small-sfx"' in run.output


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_jobs_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    (tmp_path / "source.wav").write_bytes(make_audio_file(duration_s=2.0))
    run = await run_page(DOCS / "jobs.md", tmp_path)
    expect_complete(run, "jobs.md", operations)
    assert run.frames("rain.wav") == 2 * RATE_HZ
    assert run.output.count("event: end") == 2
    first, again = re.findall(r'"status_url":"([^"]*)"', run.output)[:2]
    assert first == again


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_stable_audio_open_small_page_run(
    tmp_path: Path, operations: dict[str, set[str]]
) -> None:
    run = await run_page(DIALECTS / "stable-audio-open-small.md", tmp_path)  # the commands use the packaged riff files
    expect_complete(run, "dialects/stable-audio-open-small.md", operations)
    assert "GET /saos/health" in run.calls
    lengths = {"clip.wav": 524_288, "drums.wav": 302_400, "break.wav": 352_800, "transfer.wav": 524_288}
    assert {name: run.frames(name) for name in lengths} == lengths
    assert run.frames("riff.wav") == 302_400
    assert json.loads((tmp_path / "bass.json").read_text())["success"] is True


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_vllm_omni_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "vllm-omni.md", tmp_path)
    expect_complete(run, "dialects/vllm-omni.md", operations)
    assert (run.frames("hammer.wav"), run.frames("waves.wav")) == (3 * RATE_HZ, 5 * RATE_HZ)
    assert run.frames("dog.opus") == round(round(2 * RATE_HZ / 0.667) * 48_000 / RATE_HZ)
    assert '"small-sfx"' in run.output


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_elevenlabs_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "elevenlabs.md", tmp_path)
    expect_complete(run, "dialects/elevenlabs.md", operations)
    assert run.frames("motor.wav") == 4 * RATE_HZ
    lengths_s = {name: soundfile.info(run.folder / name).duration for name in ("door.mp3", "piano.mp3", "streamed.mp3")}
    assert lengths_s == {"door.mp3": 2, "piano.mp3": 5, "streamed.mp3": 5}


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_stability_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "stability.md", tmp_path)
    expect_complete(run, "dialects/stability.md", operations)
    assert (run.frames("pad.wav"), run.frames("rain.wav")) == (7 * RATE_HZ, 2 * RATE_HZ)
    assert soundfile.info(run.folder / "bell.mp3").duration == pytest.approx(7, abs=0.1)


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_aimlapi_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "aimlapi.md", tmp_path)
    expect_complete(run, "dialects/aimlapi.md", operations)
    assert run.frames("generated.wav") == 2 * RATE_HZ


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_fal_page_run(tmp_path: Path, operations: dict[str, set[str]]) -> None:
    run = await run_page(DIALECTS / "fal.md", tmp_path)
    expect_complete(run, "dialects/fal.md", operations)
    assert run.frames("audio.wav") == 2 * RATE_HZ
    assert json.loads((tmp_path / "output.json").read_text()).keys() == {"audio_file"}
    assert '"COMPLETED"' in run.output
    assert '"CANCELLATION_REQUESTED"' in run.output or '"ALREADY_COMPLETED"' in run.output


@pytest.mark.server
async def test_commands_of_the_readme_run(tmp_path: Path) -> None:
    run = await run_page(ROOT / "README.md", tmp_path)
    names = {"tone.wav": 3, "variation.wav": 3, "longer.wav": 5}
    assert {name: run.frames(name) for name in names} == {name: seconds * RATE_HZ for name, seconds in names.items()}
    assert (tmp_path / "loops.zip").read_bytes()[:2] == b"PK"
    assert {"POST /jobs", "GET /health", "GET /v1/models"} <= set(run.calls)
    assert run.frames("kick.wav") == 2 * RATE_HZ
    assert [request.batch_size for _, request in run.backend.requests[:4]] == [1, 3, 1, 1]


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_clients_page_run(tmp_path: Path) -> None:
    (tmp_path / "source.wav").write_bytes(make_audio_file(duration_s=8.0))
    run = await run_page(DOCS / "clients.md", tmp_path)
    lengths = {"rain-on-a-tin-roof-7.wav": 4, "again.wav": 4, "wolf.wav": 2, "a-door-slams*": 8, "waves*": 13}
    assert {name: run.frames(*run.named(name)) for name in lengths} == {n: s * RATE_HZ for n, s in lengths.items()}
    assert len(run.named("bells/*.flac")) == len(run.named("rain/*.wav")) == 4
    assert run.frames(*run.named("techno*")) == 4 * 4 * 60 * RATE_HZ // 128


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_tutorial_page_run(tmp_path: Path) -> None:
    run = await run_page(DOCS / "tutorial.md", tmp_path)
    lengths = {"a-440-hz-sine-tone-7": 3, "chord": 3, "piano": 3, "mended": 3, "longer": 5, "loop": 4}
    assert {name: run.frames(f"{name}.wav") for name in lengths} == {n: s * RATE_HZ for n, s in lengths.items()}
    assert (len(run.named("drums/*.flac")), len(run.named("rain/*.wav"))) == (4, 2)
    assert "x-seed:" in run.output.lower()


@pytest.mark.server
@pytest.mark.slow
async def test_commands_of_the_security_page_run(tmp_path: Path) -> None:
    run = await run_page(DOCS / "security.md", tmp_path)
    assert [line.split()[0] for line in run.output.splitlines()] == ["alice", "ops"]


def test_settings_named_on_pages_exist() -> None:
    document = Settings().model_dump()
    sections = "api|audio|dialects|ingress|jobs|metrics|proxy|quality_gate|storage"
    unknown = [
        f"{page}: {section}.{key}"
        for page in pages()
        for section, key in re.findall(rf"`({sections})\.(\w+)`", (ROOT / page).read_text())
        if key not in document[section]
    ]
    assert not unknown


def test_documented_defaults_are_those_of_the_settings() -> None:
    """Checks table rows such as | `jobs.runners` | 1 | and text such as `drain_s` (20 s)."""
    settings = Settings().model_dump()
    defaults = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for section, values in settings.items():
        if isinstance(values, dict):
            defaults |= {f"{section}.{key}": value for key, value in values.items()}
    for path, names in VARIABLES.items():
        defaults |= dict.fromkeys(names, defaults[".".join(path)])
    defaults |= ModelSettings(name="demo").model_dump() | ReplicaSettings().model_dump()
    units = {"": 1, " s": 1, " seconds": 1, " MiB": 2**20, " GiB": 2**30}
    number = rf"([\d.]+)({'|'.join(units)})"
    found = []
    for page in pages():
        text = (ROOT / page).read_text()
        found += [
            (page, *row) for row in re.findall(rf"^\| `([\w.]+)`[^|]*\| {number}(?:,[^|]*)? \|", text, re.MULTILINE)
        ]
        found += [(page, *row) for row in re.findall(rf"`([\w.]+)` \({number}\)", text)]
        found += [(page, *row, "") for row in re.findall(r"^\| `([\w.]+)`[^|]*\| `([^`|]+)` \|", text, re.MULTILINE)]
    wrong, num_checked = [], 0
    for page, name, value, unit in found:
        default = defaults.get(name)
        if isinstance(default, bool | str):
            num_checked, is_right = num_checked + 1, str(default).lower() == value.lower()
        elif isinstance(default, int | float):
            num_checked, is_right = num_checked + 1, default == float(value) * units[unit]
        else:
            continue  # no setting, or a default in words
        if not is_right:
            wrong.append(f"{page}: {name} is {default}, not {value}{unit}")
    assert wrong == []
    assert num_checked >= 25


def test_documented_limits_of_slow_clients_are_those_in_use() -> None:
    times = ClientTimes()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (DOCS / "security.md").read_text(), re.MULTILINE)
    assert {
        ("time for the whole body", f"{times.total_s:g} s, and at least {times.rate_bytes_s / 1024:g} kB a second"),
        ("speed of reading a response", f"{64 * 60 / times.send_idle_s:g} KiB a minute; slower connections are closed"),
        ("slow bodies in one process", f"{times.max_slow}, of which {times.max_slow_per_client} of one client"),
        ("size of a JSON body", f"{MAX_FIELDS_BYTES / 2**20:g} MiB"),
        ("size of decoded audio in one process", f"{MAX_SOURCE_BYTES / 2**30:g} GiB"),
        ("length of a prompt and a negative prompt", f"{MAX_PROMPT_CHARS:,} characters"),
    } - set(rows) == set()


def test_documented_limits_of_event_streams_are_those_in_use() -> None:
    limits, text = StreamLimits(), " ".join((DOCS / "jobs.md").read_text().split())
    assert f"Idle streams get a comment every {limits.comment_s:g} s." in text
    assert f"has at most {limits.max_open} open streams and answers 503 to more" in text
    assert f"and at most {limits.max_open_per_client} of one client and answers 429 to more" in text


def test_every_page_with_commands_is_run() -> None:
    with_commands = {block.page for block in all_blocks() if block.language == "bash"}
    assert with_commands == {f"docs/{page}" for page in TAGS} | {"README.md"}
