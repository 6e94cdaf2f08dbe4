"""Generated requests, valid and invalid, to every operation in the OpenAPI description.

All checks of Schemathesis run. `make fuzz` sends many more requests, with another seed each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from tests.api.fuzzing import Known, is_lenient, make_meaningful, run_server
from tests.backends import ToneBackend
from tests.parameters import slow
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server  # tests that run a server are marked, because they are slow

IS_LONG = "FUZZ_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
# Largest number of requests for each operation that have a field at or just beyond its bound.
EDGE_CASES = 100_000 if IS_LONG else 10
_sent: list[str] = []

# Statuses with which an invalid request may be refused: Schemathesis' own list, 412 (fal's proxy path) and 413.
_REFUSALS = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429]
_CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": _REFUSALS}}})

Operation = schemathesis.schemas.APIOperation


@pytest.fixture(scope="module")
def described() -> dict[str, Operation]:
    """Returns the described operations by method and path. At import, each test process would need 2 s for this."""
    schema = schemathesis.openapi.from_dict(create_app(ToneBackend(), Settings()).openapi(), config=_CONFIG)
    return {operation.label: operation for operation in (result.ok() for result in schema.get_all_operations())}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_server(tmp_path_factory.mktemp("riffs")) as url:
        yield url


@pytest.fixture(scope="module")
def known(url: str) -> Known:
    return Known.make(url)


def edge_cases(operation: Operation) -> list[schemathesis.Case]:
    """Returns at most `EDGE_CASES` of the requests with a field at or just beyond its bound, evenly selected."""
    schema = operation.schema
    config = schema.config.generation_for(operation=operation, phase="coverage")
    cases = list(schema.iter_coverage_cases(operation, generation_modes=list(GenerationMode), generation_config=config))
    return cases[:: -(-len(cases) // EDGE_CASES)]


def labels() -> list[str]:
    """Returns the method and path of each operation."""
    app = create_app(ToneBackend(), Settings())
    return [
        f"{method} {context.path_format}"
        for context in iter_route_contexts(app.routes)
        if context.include_in_schema
        for method in sorted(context.methods or ())
    ]


LABELS = list(dict.fromkeys(labels()))
# The body of `/generate` is one of two: that of `/v1/audio/generations`, or that of Open Small, for which
# test_merged.py and test_hostile_requests.py have examples.
FEWER = [slow(label) if label == "POST /generate" else label for label in LABELS]


def test_every_described_operation_is_called(described: dict[str, Operation]) -> None:
    assert set(LABELS) == described.keys()


# One plain test per operation. Schemathesis' own tests all have one name, and pytest-xdist takes them for one test.
@pytest.mark.parametrize("label", FEWER)
def test_every_response_matches_the_description(
    label: str, described: dict[str, Operation], url: str, known: Known
) -> None:
    operation = described[label]

    def send(case: schemathesis.Case) -> None:
        if case.meta.generation.mode is GenerationMode.POSITIVE:
            make_meaningful(case, known)
        elif is_lenient(case):
            return
        _sent.append(case.path)
        case.call_and_validate(base_url=url, timeout=PATIENCE_S)

    for case in edge_cases(operation):
        send(case)
    strategies = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]
    options = {"max_examples": EXAMPLES, "derandomize": not IS_LONG, "suppress_health_check": list(HealthCheck)}
    settings(deadline=None, **options)(given(st.one_of(strategies))(send))()


def test_enough_requests_were_sent() -> None:
    assert len(_sent) >= 500
