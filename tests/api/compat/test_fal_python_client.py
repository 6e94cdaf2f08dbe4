"""The unmodified Python client of fal with a real server, with both ways of configuring another server."""

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
from tests.api.compat.client_scripts import check_output, run_script
from tests.api.compat.serving import serve_app

SCRIPT = Path(__file__).parent / "clients" / "fal_python.py"
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the files of a self-signed certificate for localhost: certificate, key, and authority for the client."""
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
async def seen(request: pytest.FixtureRequest, certificate: dict[str, Path]) -> AsyncIterator[dict[str, Any]]:
    """Returns the client's results: with TLS through its environment, or over HTTP through its URL formats."""
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
        command = (sys.executable, str(SCRIPT), request.param, base)
        yield await run_script(*command, environment=environment) | {"base": base, "refusals": refusals}


def test_run(seen: dict[str, Any]) -> None:
    check_output(seen["run"], seen["base"])


def test_submit_status_events_and_result(seen: dict[str, Any]) -> None:
    submit = seen["submit"]
    assert submit["first"] in ("Queued", "InProgress")
    assert submit["events"][-2:] == ["InProgress", "Completed"]
    assert submit["num_logs"] >= 2
    assert submit["inference_time"] >= PromptBackend.pause_s
    assert submit["error"] is None
    check_output(submit["result"], seen["base"])
    assert submit["again"] == submit["result"]


def test_subscribe(seen: dict[str, Any]) -> None:
    assert (seen["subscribe"]["num_ids"], seen["subscribe"]["last"]) == (1, "Completed")
    check_output(seen["subscribe"]["result"], seen["base"])


def test_the_asynchronous_client(seen: dict[str, Any]) -> None:
    assert seen["subscribe_async"]["last"] == "Completed"
    check_output(seen["subscribe_async"]["result"], seen["base"])
    check_output(seen["subscribe_async"]["run"], seen["base"])


def test_cancel(seen: dict[str, Any]) -> None:
    cancel = seen["cancel"]
    assert cancel["error_type"] == "client_cancelled"
    assert (cancel["result"]["status"], cancel["result"]["error_type"]) == (499, "client_cancelled")
    assert cancel["result"]["detail"] == cancel["error"]


def test_client_timeout_cancels_the_request(seen: dict[str, Any]) -> None:
    assert seen["client_timeout"] == {"error_type": "client_cancelled"}


def test_start_timeout_is_raised(seen: dict[str, Any]) -> None:
    late = seen["start_timeout"]
    assert (late["status"], late["error_type"]) == (504, "request_timeout")


def test_upload(seen: dict[str, Any]) -> None:
    assert seen["upload"] == {"take_1.wav": True, "upload.bin": True, "take_2.wav": True}


def test_input_errors_contain_the_entries_of_the_fields(seen: dict[str, Any]) -> None:
    fields = {"invalid run": "steps", "invalid submit": "prompt", "invalid subscribe": "seconds_total"}
    for name, field in fields.items():
        error = seen["errors"][name]
        assert error["status"] == 422
        assert [entry["loc"] for entry in error["detail"]] == [["body", field]]
        assert field in error["text"]


def test_other_errors(seen: dict[str, Any]) -> None:
    errors = seen["errors"]
    assert (errors["failed"]["status"], errors["failed"]["error_type"]) == (500, "internal_error")
    assert errors["unknown app"]["status"] == 404
    assert errors["unknown request"]["status"] == 404
    assert (errors["too late to cancel"]["status"], errors["stream"]) == (400, "SSEError")


def test_client_does_not_retry_refusals(seen: dict[str, Any]) -> None:
    """Each status occurs once per call of the script. 499 is left out, because polling may meet it again."""
    assert {status: count for status, count in seen["refusals"].items() if status != 499} == {
        400: 1,
        404: 3,
        422: 3,
        500: 1,
        504: 1,
    }
