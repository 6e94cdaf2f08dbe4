"""The unmodified JavaScript client of fal with a real server, which the client calls through fal's proxy path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.api.compat.backends import PromptBackend
from tests.api.compat.client_scripts import ONE_SECOND, check_output, run_script
from tests.api.compat.serving import serve_app
from tests.packages import install_npm

CLIENT = "@fal-ai/client@1.10.1"
SCRIPT = Path(__file__).parent / "clients" / "fal_node.cjs"
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def node_path() -> Path:
    """Returns the folder with fal's JavaScript client."""
    return install_npm(CLIENT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def results(node_path: Path) -> AsyncIterator[dict[str, Any]]:
    """Run the client once against a server. Returns everything that the client's script prints."""
    refusals: Counter[int] = Counter()
    async with serve_app(PromptBackend(), jobs={"max_running": 2}, refusals=refusals) as (port, _):
        base = f"http://localhost:{port}"
        environment = {**os.environ, "NODE_PATH": str(node_path)}
        yield await run_script("node", str(SCRIPT), base, environment=environment) | {
            "base": base,
            "refusals": refusals,
        }


def test_run_returns_audio(results: dict[str, Any]) -> None:
    check_output(results["run"]["data"], results["base"])
    assert len(results["run"]["requestId"]) == 36


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe_follows_the_request_and_returns_audio(results: dict[str, Any], mode: str) -> None:
    subscribed = results[mode]
    check_output(subscribed["data"], results["base"])
    assert subscribed["ids"] == [subscribed["requestId"]]
    assert subscribed["statuses"][-2:] == ["IN_PROGRESS", "COMPLETED"]
    assert len(subscribed["messages"]) >= 3
    assert len(set(subscribed["messages"])) == len(subscribed["messages"])  # the stream repeats no message


def test_submit_status_stream_and_result(results: dict[str, Any]) -> None:
    queue = results["queue"]
    assert queue["queue_position"] == 0
    assert queue["first"] in ("IN_QUEUE", "IN_PROGRESS")
    assert queue["events"][-1] == "COMPLETED"
    assert queue["last"]["status"] == "COMPLETED"
    assert queue["result"]["requestId"] == queue["requestId"]
    check_output(queue["result"]["data"], results["base"])


def test_request_can_be_cancelled(results: dict[str, Any]) -> None:
    assert results["cancel"]["status"]["error_type"] == "client_cancelled"
    result = results["cancel"]["result"]
    assert (result["status"], result["body"]["error_type"]) == (499, "client_cancelled")


def test_uploaded_files_are_unchanged(results: dict[str, Any]) -> None:
    assert results["upload"]["small"] == [200, "audio/wav", 5000]
    check_output(results["upload"]["withBlob"], results["base"])


def test_endpoints_of_stable_audio_3(results: dict[str, Any]) -> None:
    made = results["stableAudio3"]
    for name in ("text", "variation"):
        file = made[name]["audio"]
        assert file["url"].startswith(f"{results['base']}/files/")
        assert (file["content_type"], file["file_size"], made[name]["seed"]) == ("audio/wav", ONE_SECOND, 5)
    assert (made["invalid"]["name"], made["invalid"]["status"]) == ("ValidationError", 422)


def test_start_timeout_is_reported_as_the_users(results: dict[str, Any]) -> None:
    late = results["startTimeout"]
    assert (late["status"], late["isUserTimeout"], late["body"]["error_type"]) == (504, True, "request_timeout")


def test_input_errors_are_validation_errors_by_field(results: dict[str, Any]) -> None:
    for name in ("steps", "queued"):
        error = results["errors"][name]
        assert (error["name"], error["isValidation"], error["status"]) == ("ValidationError", True, 422)
        assert error["stepsErrors"] == 1
        assert len(error["requestId"]) == 36
    assert results["errors"]["noInput"]["body"]["detail"][0]["loc"] == ["body", "prompt"]


def test_other_errors_keep_their_status(results: dict[str, Any]) -> None:
    errors = results["errors"]
    assert {name: error["status"] for name, error in errors.items() if not error["isValidation"]} == {
        "failed": 500,
        "unknownApp": 404,
        "tooLate": 400,
    }
    assert errors["failed"]["body"]["error_type"] == "internal_error"
    assert errors["tooLate"]["body"] == {"status": "ALREADY_COMPLETED"}


def test_client_does_not_retry_refusals(results: dict[str, Any]) -> None:
    """The server sends each refusal once. Only 499 may occur more often, because the client polls."""
    assert {status: count for status, count in results["refusals"].items() if status != 499} == {
        400: 1,
        404: 1,
        422: 4,
        500: 1,
        504: 1,
    }
