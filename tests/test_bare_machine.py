"""The engine can be used on a machine that has torch but not the packages of the server, such as Ray and FastAPI."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABSENT = ("ray", "fastapi", "starlette", "pydantic", "soundfile", "soxr", "structlog", "typer", "psycopg", "boto3")
MODULES = ("engine", "models.families", "sampling", "audio.prepare", "verification")


@pytest.mark.server
def test_engine_models_and_sampling_import_without_the_servers_packages() -> None:
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))  # importing them fails\n"
        f"import {', '.join(f'stable_audio_serve.{module}' for module in MODULES)}\n"
        "import benchmarks.cli, benchmarks.gpu.__main__\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
