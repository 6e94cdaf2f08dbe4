"""The commands that generate audio, run in this process or as separate processes. The server runs in this process."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import structlog
from typer.testing import CliRunner

from stable_audio_serve.audio.embedded_text import extract
from stable_audio_serve.cli import app
from stable_audio_serve.cli.sound_files import read_recipe
from stable_audio_serve.client.failures import Attempts
from stable_audio_serve.core.errors import GenerationError, OverloadedError
from stable_audio_serve.models.registry import BUILT_IN
from tests.adapter_files import write_file
from tests.audio_files import make_audio_file
from tests.backends import RATE_HZ, ToneBackend
from tests.client.conftest import IN_ONE_LOOP, Served, served, server
from tests.patience import PATIENCE_S, until

__all__ = ["served", "server"]

pytestmark = [pytest.mark.server, IN_ONE_LOOP]

ROOT = Path(__file__).parents[2]


def _enable_ctrl_c() -> None:
    """Make Ctrl-C work in a child process. If a shell runs the tests in the background, children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Shell:
    """Runs commands in a temporary folder. The environment variable STABLE_AUDIO_URL has the server's address."""

    folder: Path
    url: str
    backend: ToneBackend

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stable_audio_serve.cli", *arguments),
            cwd=self.folder,
            env=os.environ | {"STABLE_AUDIO_URL": self.url, "PYTHONPATH": str(ROOT)} | environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=_enable_ctrl_c,
        )

    async def run(self, *arguments: str, stdin: bytes = b"", code: int = 0, **environment: str) -> bytes:
        """Run a command that must exit with `code`.

        Returns its standard output, or standard error if `code` is not 0.
        """
        ended = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            arguments,
            input=stdin,
            env={"STABLE_AUDIO_URL": self.url} | environment,
            catch_exceptions=False,
        )
        assert ended.exit_code == code, ended.output
        return ended.stderr_bytes if code else ended.stdout_bytes

    async def files(self) -> list[str]:
        return sorted(await asyncio.to_thread(os.listdir, self.folder))

    async def read(self, name: str) -> bytes:
        return await asyncio.to_thread((self.folder / name).read_bytes)


@pytest.fixture
def shell(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # keep the server's log out of the output
    return Shell(tmp_path, served.url, served.backend)


def messages(errors: bytes) -> list[str]:
    """Return the lines of standard error, except those that say that the server is slow to answer."""
    return [line for line in errors.decode().splitlines() if not line.startswith("waiting for the server ")]


def frames(content: bytes) -> int:
    return soundfile.info(io.BytesIO(content)).frames


async def test_file_names_have_prompt_and_seed_and_are_never_reused(shell: Shell) -> None:
    printed = await shell.run("generate", "Rain on a Tin roof!", "-d", "0.5", "--seed", "7")
    assert printed == b"rain-on-a-tin-roof-7.wav\n"
    first = await shell.read("rain-on-a-tin-roof-7.wav")
    assert frames(first) == RATE_HZ // 2
    await shell.run("generate", "rain on a tin roof", "-d", "1", "--seed", "7")
    assert await shell.files() == ["rain-on-a-tin-roof-7-2.wav", "rain-on-a-tin-roof-7.wav"]
    assert await shell.read("rain-on-a-tin-roof-7.wav") == first


async def test_all_options_reach_the_server(shell: Shell) -> None:
    printed = await shell.run(
        *("generate", "rain", "-m", "medium", "-d", "0.5", "-s", "3", "-n", "2", "--steps", "5", "--cfg-scale", "2"),
        *("--sampler", "euler", "--negative-prompt", "hiss", "--format", "flac", "-o", "takes/", "--json"),
    )
    request = shell.backend.last
    assert (request.prompt, request.duration_s, request.seeds, request.steps) == ("rain", 0.5, (3, 4), 5)
    assert (request.cfg_scale, request.sampler, request.negative_prompt) == (2.0, "euler", "hiss")
    report = json.loads(printed)
    assert report["model"] == "medium"
    assert [clip["file"] for clip in report["clips"]] == ["takes/rain-3.flac", "takes/rain-4.flac"]
    assert [clip["seed"] for clip in report["clips"]] == [3, 4]
    assert frames(await shell.read("takes/rain-4.flac")) == RATE_HZ // 2


async def test_options_choose_the_encoding_of_files(shell: Shell) -> None:
    deep = ("--bit-depth", "24", "--sample-rate", "48000")
    await shell.run("generate", "rain", "-d", "0.5", "--format", "flac", *deep, "-o", "rain.flac")
    info = soundfile.info(io.BytesIO(await shell.read("rain.flac")))
    assert (info.subtype, info.samplerate) == ("PCM_24", 48_000)
    await shell.run("generate", "rain", "-d", "1", "--format", "mp3", "--bitrate", "64", "-o", "rain.mp3")
    assert len(await shell.read("rain.mp3")) * 8 / 1000 == pytest.approx(64, rel=0.2)  # with the recipe
    refused = await shell.run("generate", "rain", "--format", "mp3", "--bit-depth", "float", code=2)
    assert b"--bit-depth must be unset for mp3" in refused
    refused = await shell.run("generate", "rain", "--format", "m4a", code=2)
    assert b"--format" in refused


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["-o", "rain.mp3"], "rain.mp3", "MP3"),
        (["-o", "rain.FLAC"], "rain.FLAC", "FLAC"),
        (["-o", "rain.mp3", "--format", "flac"], "rain.mp3", "FLAC"),
        (["-o", "rain.v2"], "rain.v2", "WAV"),
        (["-o", "rain.mp3", "--local"], "rain.mp3", "MP3"),
    ],
)
async def test_the_ending_of_the_file_sets_its_format(
    arguments: list[str], name: str, expected: str, shell: Shell
) -> None:
    await shell.run("generate", "rain", "-d", "0.5", "--steps", "1", *arguments)
    assert soundfile.info(io.BytesIO(await shell.read(name))).format == expected


async def test_finishing_and_loop_options_reach_the_server(shell: Shell) -> None:
    printed = await shell.run(
        *(
            "generate",
            "rain 120 bpm",
            "--loop",
            "--bpm",
            "120",
            "--bars",
            "1",
            "--loudness",
            "-20",
            "--true-peak",
            "-3",
        ),
        *("-s", "5", "-o", "a.wav", "--json"),
    )
    assert (shell.backend.last.loop, shell.backend.last.duration_s) == ("bars", 2.0)
    (clip,) = json.loads(printed)["clips"]
    assert clip["loudness"] == pytest.approx(-20, abs=0.2)
    assert clip["true_peak"] < -15
    await shell.run("generate", "rain", "-d", "1", "--fade-in", "0.5", "--fade-out", "0.25", "-o", "b.wav")
    recipe = read_recipe(await shell.read("b.wav"))
    assert (recipe["fade_in_s"], recipe["fade_out_s"]) == (0.5, 0.25)


async def test_prompts_and_seeds_may_be_repeated(shell: Shell) -> None:
    await shell.run("generate", "rain", "--prompt", "wind", "-s", "8", "-s", "8", "-d", "0.5")
    assert (shell.backend.last.prompts, shell.backend.last.seeds) == (("rain", "wind"), (8, 8))
    assert await shell.files() == ["rain-8.wav", "wind-8.wav"]
    await shell.run("generate", "rain", "-s", "8", "-s", "8", "-d", "0.5", "-o", "same.wav")
    assert {"same-1.wav", "same-2.wav"} <= set(await shell.files())


async def test_commands_read_and_write_pipes(shell: Shell) -> None:
    """A prompt can come from standard input, and audio can go through standard output into another command."""
    take = await shell.run("generate", "-", "-d", "1", "-o", "-", stdin=b"rain\n")
    assert shell.backend.last.prompt == "rain"
    assert frames(take) == RATE_HZ
    await shell.run("variation", "-", "hail", "-d", "1", "--noise", "0.25", "-o", "hail.wav", stdin=take)
    assert shell.backend.last.init_noise_level == 0.25
    await shell.run("inpaint", "hail.wav", "hail", "-d", "1", "-r", "0.25:0.5", "-r", "0.75:1")
    assert shell.backend.last.inpaint_regions_s == ((0.25, 0.5), (0.75, 1.0))
    assert shell.backend.last.keep == "source"
    await shell.run("inpaint", "hail.wav", "hail", "-d", "1", "-r", "0.25:0.5", "--noise", "0.4")
    assert shell.backend.last.init_noise_level == 0.4
    await shell.run("extend", "hail.wav", "hail", "--after", "1.5", "--keep", "model", "-o", "long.wav")
    assert shell.backend.last.inpaint_regions_s == ((1.0, 2.5),)
    assert shell.backend.last.keep == "model"
    assert frames(await shell.read("long.wav")) == RATE_HZ * 5 // 2
    await shell.run("extend", "hail.wav", "hail", "--before", "2", "--after", "3", "-r", "0.5:0.75", "--noise", "0.5")
    assert shell.backend.last.inpaint_regions_s == ((0.0, 2.0), (2.5, 2.75), (3.0, 6.0))
    assert (shell.backend.last.source_start_s, shell.backend.last.init_noise_level) == (2.0, 0.5)
    await shell.run("loop", "techno 120bpm", "--bars", "2", "--audio", "hail.wav", "-o", "loop.wav")
    assert frames(await shell.read("loop.wav")) == 4 * RATE_HZ


async def test_a_file_is_recreated_from_its_recipe(shell: Shell) -> None:
    """The recipe may come from an audio file, a JSON file or a pipe."""
    await shell.run("generate", "rain", "-d", "0.5", "-s", "7", "-o", "rain.wav")
    report = json.loads(await shell.run("replay", "rain.wav", "--json"))
    assert (report["replay"], report["clips"][0]["file"]) == ("close", "rain-7.wav")
    rain = await shell.read("rain.wav")
    assert await shell.read("rain-7.wav") == rain
    assert await shell.run("replay", "-", "-o", "-", stdin=rain) == rain
    recipe = extract(io.BytesIO(rain))
    assert recipe is not None
    assert await shell.run("replay", "-", "-o", "-", stdin=recipe.encode()) == rain
    # With this prompt, the recipe is too long for a response header, and must come from the file.
    await shell.run("generate", "rain " * 1000, "-d", "0.5", "-s", "8", "-o", "long.wav")
    assert (await shell.run("replay", "long.wav")).startswith(b"rain-rain-")
    await shell.run("variation", "rain.wav", "hail", "-d", "0.5", "-o", "hail.flac", "--format", "flac")
    hail = await shell.read("hail.flac")
    assert await shell.run("replay", "-", "--source", "rain.wav", "-o", "-", stdin=hail) == hail
    assert b"SHA-256" in await shell.run("replay", "hail.flac", code=2)
    for junk, expected in ((b"{", b"error"), (b"", b"empty"), (make_audio_file(duration_s=0.1), b"no recipe")):
        assert expected in await shell.run("replay", "-", stdin=junk, code=2)
    assert b"standard input" in await shell.run("replay", "-", "--source", "-", code=2)


async def test_commands_reach_this_machine_without_the_proxy(shell: Shell) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}  # no server listens there
    assert json.loads(await shell.run("models", "--json", **proxy))


async def test_models_are_listed(shell: Shell) -> None:
    assert [model["id"] for model in json.loads(await shell.run("models", "--json"))][:2] == [
        "small-sfx",
        "small-music",
    ]
    shown = await shell.run("models", COLUMNS="80")
    assert b"small-sfx (default)" in shown
    assert b"stabilityai/stable-audio-3-medium" in shown
    job_id = (await shell.run("jobs", "submit", "rain")).decode().strip()
    assert job_id in (await shell.run("jobs", "list", COLUMNS="60")).decode()


FAILURES = [
    (["generate", "rain", "--steps", "0"], 2, "--steps must be"),
    (["generate", "rain", "-m", "gpt"], 2, "gpt"),
    (["generate", ""], 2, "PROMPT must not be empty"),
    (["generate", "rain", "-d", "500"], 2, "--duration must be at most"),
    (["variation", "missing.wav", "rain"], 2, "missing.wav: file not found"),
    (["inpaint", "-", "rain", "-r", "later"], 2, "START:END"),
    (["variation", "-", "-"], 2, "standard input"),
    (["extend", "-", "-", "--after", "2"], 2, "standard input"),
    (["jobs", "submit", "-", "--audio", "-"], 2, "standard input"),
    (["generate", "rain", "-o", "-", "--json"], 2, "standard output"),
    (["loop", "techno"], 2, "BPM"),
    (["jobs", "show", "abc"], 2, "'abc' is not the id of a job"),
    (["generate", "rain", "-d", "0.1", "-o", "/dev/full"], 2, "no space left on device; `stable-audio-serve jobs"),
    (["generate", "rain", "--url", "http://127.0.0.1:9"], 3, "did not answer"),
    (["generate", "rain", "--url", "nowhere"], 2, "URL"),
]


async def test_failures_print_a_sentence_and_set_the_exit_code(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    pause_s = Attempts.pause_s
    monkeypatch.setattr(Attempts, "pause_s", lambda *args: 0.0 * pause_s(*args))
    for arguments, code, expected in FAILURES:
        errors = (await shell.run(*arguments, stdin=b"no audio", code=code)).decode()
        assert expected in errors, arguments
        assert await shell.files() == [], arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-n", "2", "-o", "-"), "standard output"),
        (("--seed", "1", "--seed", "2", "-o", "-"), "standard output"),
        (("-o", "missing/clip.wav"), "missing: no such folder"),
    ],
)
async def test_output_that_cannot_be_written_is_refused_first(
    shell: Shell, options: tuple[str, ...], expected: str
) -> None:
    errors = (await shell.run("generate", "rain", *options, code=2)).decode()
    assert (expected in errors, shell.backend.requests) == (True, [])


async def test_a_malformed_key_is_not_a_fault_of_the_url(shell: Shell) -> None:
    errors = (await shell.run("models", code=2, STABLE_AUDIO_API_KEY=" abc")).decode()
    assert errors.startswith("error: the API key starts or ends with white space")


async def test_other_errors_set_the_exit_code(shell: Shell) -> None:
    shell.backend.error = GenerationError("the model made noise")
    await shell.run("generate", "rain", "-d", "0.1", code=1)
    shell.backend.error = OverloadedError("full", retry_after_s=100_000)
    await shell.run("loop", "rain 120bpm", code=5)


async def test_a_process_pipes_bytes(shell: Shell) -> None:
    process = await shell.start("generate", "-", "-d", "1", "-o", "-")
    take, errors = await process.communicate(b"rain\n")
    assert (process.returncode, messages(errors)) == (0, [])
    assert (shell.backend.last.prompt, frames(take)) == ("rain", RATE_HZ)


async def test_ctrl_c_cancels_the_request(shell: Shell) -> None:
    shell.backend.released.clear()
    process = await shell.start("generate", "rain", "-d", "0.1")
    await until(lambda: shell.backend.num_running)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE_S):
        _, errors = await process.communicate()
    assert process.returncode == 130, errors
    assert messages(errors) == ["error: interrupted"]
    await until(lambda: shell.backend.num_cancelled)
    assert await shell.files() == []


async def test_ctrl_c_does_not_wait_for_a_server_that_does_not_answer(shell: Shell) -> None:
    async def never_answer(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    silent = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    async with silent:
        port = silent.sockets[0].getsockname()[1]
        process = await shell.start("generate", "rain", STABLE_AUDIO_URL=f"http://127.0.0.1:{port}")
        assert process.stderr is not None
        await process.stderr.readuntil(b"waiting for the server")
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await process.communicate()
        assert (process.returncode, errors.splitlines()[-1]) == (130, b"error: interrupted")


async def test_names_that_the_terminal_cannot_show_are_replaced(shell: Shell) -> None:
    shell.backend.error = GenerationError("\N{HIRAGANA LETTER A} failed")
    job_id = (await shell.run("jobs", "submit", "rain")).decode().strip()
    await shell.run("jobs", "show", job_id, "--watch", code=1)
    process = await shell.start("jobs", "list", PYTHONIOENCODING="ascii", COLUMNS="200")
    listed, errors = await process.communicate()
    assert (process.returncode, messages(errors), b"? failed" in listed) == (0, [], True)


async def test_a_reader_that_ends_early_is_no_invalid_usage(shell: Shell) -> None:
    process = await shell.start("generate", "rain", "-d", "1", "-o", "-")
    assert process.stdout is not None
    process.stdout._transport.close()  # type: ignore[attr-defined]
    assert process.stderr is not None
    assert (messages(await process.stderr.read()), await process.wait()) == ([], 1)


async def test_a_job_is_submitted_watched_and_downloaded(shell: Shell) -> None:
    shell.backend.released.clear()
    job_id = (await shell.run("jobs", "submit", "rain", "-d", "0.5", "-s", "7", "-n", "2")).decode().strip()
    assert (await shell.run("jobs", "list", COLUMNS="200")).decode().count(job_id) == 1
    watching = asyncio.create_task(shell.run("jobs", "show", job_id, "--watch"))
    shell.backend.released.set()
    assert json.loads(await watching)["status"] == "succeeded"
    written = (await shell.run("jobs", "fetch", job_id, "-o", "rain/")).decode().split()
    assert written == ["rain/rain-7.wav", "rain/rain-8.wav"]
    assert frames(await shell.read(written[1])) == RATE_HZ // 2
    assert "standard output" in (await shell.run("jobs", "fetch", job_id, "-o", "-", "--json", code=2)).decode()
    assert json.loads(await shell.run("jobs", "show", job_id))["seeds"] == [7, 8]


async def test_pieces_with_sections_are_generated_submitted_and_replayed(shell: Shell) -> None:
    sections = ("--section", "1", "--section", "1.5:the rain stops", "--overlap", "0.5")
    made = (await shell.run("generate", "rain", *sections, "-s", "3")).decode().strip()
    assert frames(await shell.read(made)) == int(2.5 * RATE_HZ)
    assert [request.prompt for _, request in shell.backend.requests] == ["rain", "the rain stops"]
    job_id = (await shell.run("jobs", "submit", "rain", *sections, "-s", "3")).decode().strip()
    fetched = (await shell.run("jobs", "fetch", job_id, "-o", "piece/")).decode().strip()
    assert await shell.read(fetched) == await shell.read(made)
    again = (await shell.run("replay", made, "-o", "again.wav")).decode().split()[0]
    assert await shell.read(again) == await shell.read(made)
    assert "sections" in (await shell.run("replay", made, "--local", code=2)).decode()
    too_short = (await shell.run("generate", "rain", "--section", "2", "--section", "0", code=2)).decode()
    assert messages(too_short.encode()) == ["error: the length of --section 2 must be greater than 0"]
    assert "30:rain" in (await shell.run("generate", "rain", "--section", "x", code=2)).decode()
    assert "--section" in (await shell.run("generate", "rain", "--overlap", "2", code=2)).decode()


async def test_jobs_are_cancelled_and_found_by_idempotency_key(shell: Shell) -> None:
    shell.backend.released.clear()
    take = make_audio_file(duration_s=1.0)
    submit = ("jobs", "submit", "rain", "-d", "1", "--audio", "-", "--region", "0.25:0.5", "--idempotency-key", "one")
    first = await shell.run(*submit, stdin=take)
    assert await shell.run(*submit, stdin=take) == first
    job_id = first.decode().strip()
    await shell.run("jobs", "cancel", job_id)
    assert "cancelled" in (await shell.run("jobs", "show", job_id, "--watch", code=130)).decode()
    assert "already ended" in (await shell.run("jobs", "cancel", job_id, code=2)).decode()
    other = (await shell.run("jobs", "submit", "rain", "-d", "1")).decode().strip()
    assert job_id in (await shell.run("jobs", "cancel", job_id, "x", other, code=2)).decode()
    await shell.run("jobs", "show", other, "--watch", code=130)
    assert "cancelled" in (await shell.run("jobs", "fetch", job_id, code=130)).decode()
    assert "not found" in (await shell.run("jobs", "show", "0" * 32, code=2)).decode()
    assert "--audio" in (await shell.run("jobs", "submit", "rain", "-r", "1:2", code=2)).decode()
    assert "--region" in (await shell.run("jobs", "submit", "rain", "--keep", "model", code=2)).decode()


async def test_local_generates_and_replays_without_a_server(shell: Shell) -> None:
    await shell.run("generate", "a kick drum", "--local", "-d", "0.5", "-s", "3", "--steps", "4", "-o", "one.wav")
    assert frames(await shell.read("one.wav")) == RATE_HZ // 2
    assert json.loads(await shell.run("replay", "one.wav", "--local", "-o", "three.wav", "--json"))["replay"] == "exact"
    assert await shell.read("three.wav") == await shell.read("one.wav")
    assert not shell.backend.requests


async def test_local_uses_the_server_configuration(shell: Shell) -> None:
    """The configuration sets the model for loops and turns recipes on. Its API keys do not apply to `--local`."""
    demo = str(BUILT_IN["demo"].folder)
    args = {
        "models": [{"name": "demo"}, {"name": "loops", "path": demo}],
        "dialects": {"model": "loops", "recipes": True},
        "api": {"key_file": str(shell.folder / "keys")},
    }
    application = {"import_path": "stable_audio_serve.serving.app:build", "args": args}
    config = json.dumps({"applications": [application]})
    await asyncio.to_thread((shell.folder / "serve_config.yaml").write_text, config)
    loop = ("loop", "kick drum 120bpm", "--bars", "1", "--steps", "2", "--local", "-o", "loop.wav", "--json")
    assert json.loads(await shell.run(*loop))["model"] == "loops"
    assert extract(io.BytesIO(await shell.read("loop.wav"))) is not None


async def test_local_takes_files_of_adapters(shell: Shell) -> None:
    write_file(shell.folder / "rough.safetensors", shape=(576, 192))  # the first layer of the demo model
    make = ("generate", "a kick drum", "--local", "-d", "0.5", "-s", "3", "--steps", "2")
    await shell.run(*make, "-o", "plain.wav")
    await shell.run(*make, "-o", "rough.wav", "--lora", "rough.safetensors:0.5")
    plain, rough = [soundfile.read(io.BytesIO(await shell.read(f"{name}.wav")))[0] for name in ("plain", "rough")]
    assert np.abs(plain - rough).max() > 0.01
    recipe = read_recipe(await shell.read("rough.wav"))
    assert [(lora["name"], lora["strength"]) for lora in recipe["loras"]] == [("rough", 0.5)]
    write_file(shell.folder / "other" / "rough.safetensors", shape=(576, 192), seed=2)
    both = ("--lora", "rough.safetensors:0.5", "--lora", "other/rough.safetensors:0.5")
    await shell.run(*make, "-o", "both.wav", *both, "--quiet")
    first, second = read_recipe(await shell.read("both.wav"))["loras"]
    assert (first["name"], second["name"]) == ("rough", "rough-2")
    assert first["sha256"] != second["sha256"]
