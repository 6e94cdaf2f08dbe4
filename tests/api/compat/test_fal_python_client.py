"""The unmodified Python client of fal with a real server. The client is configured in two ways."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme

from tests.api.compat.backends import PromptBackend
from tests.api.compat.client_scripts import ONE_SECOND, check_output, run_script
from tests.api.compat.serving import serve_app
from tests.audio_files import make_audio_file

SCRIPT = Path(__file__).parent / "clients" / "fal_python.py"
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the files of a TLS certificate for localhost: chain, key, and the authority that clients must trust."""
    folder = tmp_path_factory.mktemp("certificate")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    files = {name: folder / f"{name}.pem" for name in ("chain", "key", "authority")}
    authority.cert_pem.write_to_path(str(files["authority"]))
    issued.private_key_pem.write_to_path(str(files["key"]))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(files["chain"]), append=True)
    return files


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["environment", pytest.param("formats", marks=pytest.mark.slow)]
)
async def results(
    request: pytest.FixtureRequest, certificate: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Any]]:
    """Run the client once and return its results.

    The client uses TLS and is configured by environment variables, or it uses HTTP and is configured by URL formats.
    """
    is_tls = request.param == "environment"
    pair = (certificate["chain"], certificate["key"]) if is_tls else None
    refusals: Counter[int] = Counter()
    async with serve_app(PromptBackend(), certificate=pair, jobs={"max_running": 2}, refusals=refusals) as (port, _):
        address = f"localhost:{port}"
        environment = {**os.environ, "FAL_KEY": "id:secret"}
        if is_tls:
            environment |= {
                "SSL_CERT_FILE": str(certificate["authority"]),
                "FAL_RUN_HOST": address,
                "FAL_QUEUE_RUN_HOST": f"{address}/queue",
            }
        base = f"{'https' if is_tls else 'http'}://{address}"
        source = tmp_path_factory.mktemp("source") / "source.wav"
        source.write_bytes(make_audio_file(duration_s=1))
        command = (sys.executable, str(SCRIPT), request.param, base, str(source))
        yield await run_script(*command, environment=environment) | {"base": base, "refusals": refusals}


def test_run_returns_audio(results: dict[str, Any]) -> None:
    check_output(results["run"], results["base"])


def test_submit_status_events_and_result(results: dict[str, Any]) -> None:
    submit = results["submit"]
    assert submit["first"] in ("Queued", "InProgress")
    assert submit["events"][-2:] == ["InProgress", "Completed"]
    assert submit["num_logs"] >= 2
    assert submit["inference_time"] >= PromptBackend.pause_s
    assert submit["error"] is None
    check_output(submit["result"], results["base"])
    assert submit["again"] == submit["result"]


def test_endpoints_of_stable_audio_3_and_25(results: dict[str, Any]) -> None:
    made = results["stable_audio_3"]
    for name in ("text", "variation"):
        file = made[name]["audio"]
        assert file["url"].startswith(f"{results['base']}/files/")
        assert (file["content_type"], file["file_size"], made[name]["prompt"]) == ("audio/wav", ONE_SECOND, "quick")
    assert made["text"]["seed"] == 5
    assert made["longer"]["audio"]["content_type"] == "audio/mpeg"
    assert made["inline"].keys() == {"audio", "seed"}
    assert made["inline"]["audio"]["url"].startswith("data:audio/wav;base64,")
    assert (made["invalid"]["status"], made["unserved"]["status"]) == (422, 404)
    assert [entry["loc"] for entry in made["invalid"]["detail"]] == [
        ["body", "mask_start_seconds"],
        ["body", "mask_end_seconds"],
    ]


def test_subscribe_follows_the_request_and_returns_audio(results: dict[str, Any]) -> None:
    assert (results["subscribe"]["num_ids"], results["subscribe"]["last"]) == (1, "Completed")
    check_output(results["subscribe"]["result"], results["base"])


def test_asynchronous_client_returns_audio(results: dict[str, Any]) -> None:
    assert results["subscribe_async"]["last"] == "Completed"
    check_output(results["subscribe_async"]["result"], results["base"])
    check_output(results["subscribe_async"]["run"], results["base"])


def test_request_can_be_cancelled(results: dict[str, Any]) -> None:
    cancel = results["cancel"]
    assert cancel["error_type"] == "client_cancelled"
    assert (cancel["result"]["status"], cancel["result"]["error_type"]) == (499, "client_cancelled")
    assert cancel["result"]["detail"] == cancel["error"]


def test_client_timeout_cancels_the_request(results: dict[str, Any]) -> None:
    assert results["client_timeout"] == {"error_type": "client_cancelled"}


def test_start_timeout_is_raised(results: dict[str, Any]) -> None:
    late = results["start_timeout"]
    assert (late["status"], late["error_type"]) == (504, "request_timeout")


def test_uploaded_files_are_unchanged(results: dict[str, Any]) -> None:
    assert results["upload"] == {"take_1.wav": True, "upload.bin": True}


def test_input_errors_contain_the_entries_of_the_fields(results: dict[str, Any]) -> None:
    fields = {"invalid run": "steps", "invalid submit": "prompt", "invalid subscribe": "seconds_total"}
    for name, field in fields.items():
        error = results["errors"][name]
        assert error["status"] == 422
        assert [entry["loc"] for entry in error["detail"]] == [["body", field]]
        assert field in error["text"]


def test_other_errors_keep_their_status(results: dict[str, Any]) -> None:
    errors = results["errors"]
    assert (errors["failed"]["status"], errors["failed"]["error_type"]) == (500, "internal_error")
    assert errors["unknown app"]["status"] == 404
    assert errors["unknown request"]["status"] == 404
    assert (errors["too late to cancel"]["status"], errors["stream"]) == (400, "SSEError")


def test_client_does_not_retry_refusals(results: dict[str, Any]) -> None:
    """The server sends each refusal once. Only 499 may occur more often, because the client polls."""
    assert {status: count for status, count in results["refusals"].items() if status != 499} == {
        400: 1,
        404: 4,
        422: 4,
        500: 1,
        504: 1,
    }
