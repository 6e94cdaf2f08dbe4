"""Generated requests against every operation of the OpenAPI page, in and out of its bounds, all checks of Schemathesis.

`make fuzz` makes ten times as many, with another seed each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, settings
from schemathesis import GenerationMode

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.offline import OfflineBackend
from stable_audio_serve.core.settings import Settings
from tests.api.fuzzing import Known, is_lenient, make_meaningful, run_server
from tests.patience import PATIENCE_S

# Serial: Schemathesis gives the tests of all operations one name, which pytest-xdist takes for one test.
pytestmark = [pytest.mark.slow, pytest.mark.serial]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
_sent: list[str] = []

# What may refuse a wrong request: Schemathesis' own list, 412 of fal's proxy path, and 413.
_REFUSALS = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429]
_CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": _REFUSALS}}})
schema = schemathesis.openapi.from_dict(create_app(OfflineBackend(), Settings()).openapi(), config=_CONFIG)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_server(tmp_path_factory.mktemp("riffs")) as url:
        yield url


@pytest.fixture(scope="module")
def known(url: str) -> Known:
    return Known.make(url)


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 12, suppress_health_check=list(HealthCheck))
def test_every_answer_is_the_described_one(case: schemathesis.Case, url: str, known: Known) -> None:
    if case.meta.generation.mode is GenerationMode.POSITIVE:
        make_meaningful(case, known)
    else:
        assume(not is_lenient(case))
    _sent.append(case.path)
    case.call_and_validate(base_url=url, timeout=PATIENCE_S)


def test_there_were_enough_requests() -> None:
    assert len(_sent) >= 1000
