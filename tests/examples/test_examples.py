"""Every program of `examples/` runs to its end with a server that has the demo model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import standardwebhooks

from stable_audio_serve.client import AsyncClient
from tests.examples.conftest import SECRET
from tests.examples.programs import EXAMPLES, Programs, find_examples, finish, wait_for
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.server, pytest.mark.slow]
module_loop = pytest.mark.asyncio(loop_scope="module")  # for tests that use the server, which runs in this event loop

# Examples with clients of other systems -> the audio files that they write -> the duration of each file in seconds.
CLIENTS: dict[str, dict[str, float]] = {
    "clients/aimlapi/generate.py": {"generated.wav": 1},
    "clients/aimlapi/generate.sh": {"generated.wav": 1},
    "clients/fal/queue.sh": {"loop.wav": 1},
    "clients/fal/subscribe.py": {"queue.wav": 1, "run.wav": 1, "subscribe.wav": 1},
    "clients/stable_audio_3/generate.py": {"longer.wav": 3, "organ.wav": 1, "tone.wav": 1},
    "clients/stable_audio_3/generate.sh": {"kick.wav": 1, "organ.wav": 1, "tone.wav": 1},
    "clients/stable_audio_3/job.py": {"kick.wav": 1},
    "clients/stable_audio_open_small/loops.py": {"break.wav": 8, "drums.wav": 6.86, "riff.wav": 6.86},
    "clients/stable_audio_open_small/loops.sh": {"clip.wav": 11.89, "drums.wav": 6.86, "style.wav": 11.89},
    "clients/vllm_omni/generate.py": {"hammer.wav": 1},
    "clients/vllm_omni/generate.sh": {"hammer.wav": 1},
    "clients/vllm_omni/openai_client.py": {"waves.flac": 1},
}
ARGUMENTS = {"clients/vllm_omni/generate.py": ["--audio-length", "1", "--num-inference-steps", "4"]}
# Examples that use this project's client. Each has a test function below.
OWN = {
    "batch_from_csv.py",
    "endless_continuation.py",
    "gradio_app.py",  # test_gradio.py
    "variation_ladder.py",
    "webhook_receiver.py",
}


def test_every_example_is_run() -> None:
    assert find_examples() == OWN | set(CLIENTS)


@pytest.mark.parametrize("name", CLIENTS)
@module_loop
async def test_clients_of_other_systems_write_their_files(name: str, programs: Programs) -> None:
    await programs.run(name, *ARGUMENTS.get(name, []))
    assert programs.seconds() == CLIENTS[name]


@module_loop
async def test_the_variation_ladder_writes_a_file_per_strength(programs: Programs) -> None:
    await programs.run("variation_ladder.py", "a bell", "--rungs", "2", "--duration", "1")
    assert programs.seconds() == {"ladder/0.00.wav": 1, "ladder/0.50.wav": 1, "ladder/1.00.wav": 1}


@module_loop
async def test_the_endless_clip_grows_to_its_length(programs: Programs) -> None:
    await programs.run(
        *("endless_continuation.py", "rain", "--context", "1", "--more", "1.5", "--until", "4", "--out", "rain.wav")
    )
    assert programs.seconds() == {"rain.wav": 4.5}


async def count_jobs(url: str) -> int:
    async with AsyncClient(url) as client:
        return len((await client.jobs.list(limit=100)).jobs)


@module_loop
async def test_a_batch_writes_a_file_per_row(programs: Programs) -> None:
    output = await programs.run("batch_from_csv.py", str(EXAMPLES / "prompts.csv"), "--limit", "3", "--at-once", "2")
    assert "[3/3]" in output
    names, lengths = zip(*programs.seconds().items(), strict=True)
    assert names[0].startswith("sounds/0001-an-organ-playing-c4-")
    assert lengths == (2, 2, 2)
    assert len((EXAMPLES / "prompts.csv").read_text().splitlines()) == 101


@module_loop
async def test_an_interrupted_batch_resumes(programs: Programs) -> None:
    prompts = programs.folder / "prompts.csv"
    prompts.write_text("prompt,duration\n" + "".join(f"rain number {row},0.5\n" for row in range(12)))
    num_before = await count_jobs(programs.url)
    process = await programs.start("batch_from_csv.py", "prompts.csv", "--at-once", "3")
    await wait_for(process, "[2/12]")
    process.send_signal(signal.SIGINT)
    assert "start it again" in await finish(process, 130)
    made = programs.seconds()
    assert 2 <= len(made) < 12
    assert "12 of 12" in await programs.run("batch_from_csv.py", "prompts.csv")
    assert list(programs.seconds().values()) == [0.5] * 12
    assert await count_jobs(programs.url) - num_before == 12
    assert "[" not in await programs.run("batch_from_csv.py", "prompts.csv")


@module_loop
async def test_failed_rows_are_reported_and_do_not_stop_others(programs: Programs) -> None:
    prompts = programs.folder / "prompts.csv"
    prompts.write_text("prompt,duration\nrain,0\nwind,0.5\n")
    output = await programs.run("batch_from_csv.py", "prompts.csv", code=1)
    assert "row 0001-rain" in output
    assert "duration" in output
    assert list(programs.seconds().values()) == [0.5]
    for content, fault in {
        "text,duration\nrain,1\n": "row 1 has no prompt",
        "prompt,duration\nrain,long\n": "long",
        f"prompt\n{'x' * 200_000}\n": "field",
    }.items():
        prompts.write_text(content)
        assert fault in await programs.run("batch_from_csv.py", "prompts.csv", code=1)


@module_loop
async def test_webhooks_are_verified_and_stored_once(programs: Programs) -> None:
    process = await programs.start("webhook_receiver.py", "--port", "0", STABLE_AUDIO_WEBHOOK_SECRET=SECRET)
    url = (await wait_for(process, "listens on")).split()[-1]
    async with AsyncClient(programs.url) as client, httpx.AsyncClient(timeout=PATIENCE_S) as http:
        job = await client.jobs.submit("rain", duration=0.5, webhook_url=url)
        assert job.id in await wait_for(process, ".wav")
        (stored,) = programs.seconds()
        written_at = (programs.folder / stored).stat().st_mtime_ns
        body = json.dumps({"type": "job.succeeded", "data": {"id": job.id}})
        now = datetime.now(UTC)
        headers = {"webhook-id": job.id, "webhook-timestamp": str(int(now.timestamp()))}
        signed = headers | {"webhook-signature": standardwebhooks.Webhook(SECRET).sign(job.id, now, body)}
        answers = [
            await http.post(url, content=body, headers=signed),
            await http.post(url, content=body + " ", headers=signed),
            await http.post(url, content=body, headers=headers),
        ]
    assert [answer.status_code for answer in answers] == [204, 401, 401]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.strip("/").rpartition(":")[2]))
    writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n")
    assert b" 413 " in await reader.readline()
    writer.close()
    assert (programs.folder / stored).stat().st_mtime_ns == written_at
    assert len(programs.seconds()) == 1
    process.send_signal(signal.SIGINT)
    await finish(process, 130)


async def test_a_receiver_without_a_secret_does_not_start(tmp_path: Path) -> None:
    output = await Programs(tmp_path, "http://a").run("webhook_receiver.py", code=1, STABLE_AUDIO_WEBHOOK_SECRET="")
    assert output == "error: STABLE_AUDIO_WEBHOOK_SECRET is not set\n"


@module_loop
async def test_the_endless_clip_is_a_valid_file_after_ctrl_c(programs: Programs) -> None:
    process = await programs.start("endless_continuation.py", "rain", "--context", "1", "--more", "1")
    await wait_for(process, "endless.wav: 2", end=b"\r")
    process.send_signal(signal.SIGINT)
    assert "endless.wav" in await finish(process, 0)
    length_s = programs.seconds()["endless.wav"]
    assert length_s >= 2
    assert length_s == round(length_s)


ARGUMENTS_TO_START = {
    "batch_from_csv.py": [str(EXAMPLES / "prompts.csv")],
    "endless_continuation.py": ["rain"],
    "variation_ladder.py": ["rain"],
}
# `make chaos` runs the test of Ctrl-C for every program. Other commands run it only for these, one of each kind.
FEW = [*ARGUMENTS_TO_START, "clients/aimlapi/generate.py", "clients/fal/queue.sh"]
CALLING = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.chaos) for name in [*ARGUMENTS_TO_START, *CLIENTS]
]


@pytest.mark.parametrize("name", CALLING)
async def test_ctrl_c_ends_a_program_without_a_traceback(name: str, tmp_path: Path) -> None:
    """The program gets Ctrl-C while it waits for a server that never answers."""
    connected = asyncio.Event()

    async def accept_silently(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(accept_silently, "127.0.0.1", 0) as server:
        programs = Programs(tmp_path, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        process = await programs.start(name, *ARGUMENTS_TO_START.get(name, []))
        async with asyncio.timeout(PATIENCE_S):
            await connected.wait()
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        # Python programs exit with 130. The signal itself ends shell scripts.
        killed = -signal.SIGINT if name.endswith(".sh") else 130
        await finish(process, {"endless_continuation.py": 0}.get(name, killed))
    assert programs.seconds() == {}


@pytest.mark.parametrize("name", CALLING)
async def test_an_invalid_address_is_reported(name: str, tmp_path: Path) -> None:
    code = 6 if name.endswith(".sh") else 1
    output = await Programs(tmp_path, "nowhere").run(name, *ARGUMENTS_TO_START.get(name, []), code=code)
    assert output.startswith(("error: ", "curl: "))
    assert "nowhere" in output


@pytest.mark.parametrize(
    ("name", "num_answers"), [("clients/fal/queue.sh", 1), ("clients/stable_audio_3/generate.sh", 3)]
)
async def test_scripts_end_when_the_server_stops(name: str, num_answers: int, tmp_path: Path) -> None:
    body = json.dumps({"id": "a" * 32, "request_id": "b"}, separators=(",", ":")).encode()
    num_asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == num_answers:
            server.close()
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    programs = Programs(tmp_path, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert "curl: (7)" in await programs.run(name, code=7)
    assert num_asked == num_answers


@pytest.mark.chaos
@pytest.mark.parametrize("name", [*ARGUMENTS_TO_START, *CLIENTS])
async def test_programs_report_a_missing_server(name: str, tmp_path: Path) -> None:
    code = 7 if name.endswith(".sh") else 1
    output = await Programs(tmp_path, "http://127.0.0.1:9").run(name, *ARGUMENTS_TO_START.get(name, []), code=code)
    assert output.startswith(("error: ", "curl: "))
    assert "127.0.0.1" in output
