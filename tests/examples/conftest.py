from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.api.compat.serving import serve_app
from tests.examples.programs import Programs

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url() -> AsyncIterator[str]:
    """Run a server with the demo model and with jobs. Yields the server's URL."""
    jobs = {"webhook_secret": SECRET, "webhook_allow_hosts": ["127.0.0.1"]}
    demo = {"name": "demo", "engine": {"warmup_budget_s": 0}}
    settings = Settings.model_validate({"models": [demo], "device": "cpu"})
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with (
        LocalBackend(plan_deployments(settings).catalog, engines) as backend,
        serve_app(backend, models=[demo], jobs=jobs) as (port, _),  # type: ignore[arg-type]
    ):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def programs(tmp_path: Path, url: str) -> Programs:
    return Programs(tmp_path, url)
