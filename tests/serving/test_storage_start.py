"""If a server cannot store files, it prints an error of one sentence and exits before Ray starts."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.object_storage import ObjectStorage
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY
from tests.serving.launched import command, free_port, write_config

pytestmark = pytest.mark.slow


def refusal(folder: Path, **variables: str) -> str:
    """Start a server with these environment variables. It must fail to start. Return what it prints."""
    config = write_config(folder, {"models": [{"name": "tiny", "path": TINY}]})
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "R2_"))}
    result = subprocess.run(
        command(config, "--port", str(free_port())),
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean | {"PYTHONPATH": os.getcwd(), "AWS_EC2_METADATA_DISABLED": "true"} | variables,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("configuration: "))
    return line


@pytest.fixture(scope="module")
def program_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return how many seconds a failing start takes if it needs no network."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "file").touch()
    started_at = time.monotonic()
    refusal(folder, STABLE_AUDIO_OUTPUT_DIR=str(folder / "file" / "outputs"))
    return time.monotonic() - started_at


def soon(folder: Path, program_s: float, **variables: str) -> str:
    """Call `refusal`. Check that the start fails within 35 s plus twice `program_s`."""
    started_at = time.monotonic()
    line = refusal(folder, **variables)
    assert time.monotonic() - started_at < 35 + 2 * program_s
    return line


def test_unusable_bucket_is_named(object_storage: ObjectStorage, tmp_path: Path, program_s: float) -> None:
    variables = object_storage.environ("no-such-bucket")
    assert "error: storage.bucket (STABLE_AUDIO_STORAGE_BUCKET" in soon(tmp_path, program_s, **variables)


def test_invalid_key_is_named_and_not_shown(object_storage: ObjectStorage, tmp_path: Path, program_s: float) -> None:
    bucket = object_storage.make_bucket()
    with object_storage.requiring_keys("s3:*") as (key, _):
        variables = object_storage.environ(bucket, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY="wrong-secret")
        line = soon(tmp_path, program_s, **variables)
    assert "error: storage.access_key_id (AWS_ACCESS_KEY_ID" in line
    assert "SignatureDoesNotMatch" in line
    assert "wrong-secret" not in line


def test_unreachable_service_is_named(object_storage: ObjectStorage, tmp_path: Path, program_s: float) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    variables = object_storage.environ("some-bucket", STABLE_AUDIO_STORAGE_ENDPOINT_URL=url)
    line = soon(tmp_path, program_s, **variables)
    assert "error: storage.endpoint_url (STABLE_AUDIO_STORAGE_ENDPOINT_URL" in line
    assert url in line


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(tmp_path, STABLE_AUDIO_OUTPUT_DIR=str(tmp_path / "file" / "outputs"))
    assert "error: output_dir (STABLE_AUDIO_OUTPUT_DIR)" in line
