"""The OpenAPI description is complete and has no two operations with the same name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from tests.api.prefixes import PREFIXES
from tests.backends import ToneBackend

FAL = "/fal-ai/stable-audio"
REQUESTS = "/fal-ai/{app}/requests/{request_id}"

# Paths that the description omits -> the equivalent path that it contains.
ALIASES = {
    f"{FAL}/{{endpoint}}": FAL,
    **{f"{host}{FAL}/{{endpoint}}": f"{host}{FAL}" for host in ("/queue", "/run")},
    f"/queue{REQUESTS}/response": f"/queue{REQUESTS}",
    **{
        f"{host}{REQUESTS}{what}": f"/queue{REQUESTS}{described}"
        for host in ("", "/run")
        for what, described in (
            ("", ""),
            ("/response", ""),
            *((f"/{x}",) * 2 for x in ("status", "status/stream", "cancel")),
        )
    },
}


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(ToneBackend(), Settings())


@pytest.fixture(scope="module")
def paths(app: Any) -> dict[str, dict[str, Any]]:
    return app.openapi()["paths"]


def routes(app: Any) -> set[tuple[str, str]]:
    return {
        (method, context.path_format) for context in iter_route_contexts(app.routes) for method in context.methods or ()
    }


def test_every_route_is_described(app: Any, paths: dict[str, dict[str, Any]]) -> None:
    described = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    missing = set()
    for method, path in routes(app):
        prefix = next((prefix for prefix in PREFIXES if path.startswith(f"{prefix}/")), "")
        if path in paths and prefix:
            continue
        at_root = path.removeprefix(prefix)
        twins = {method, "GET"} if method == "HEAD" else {method}
        if not {(twin, ALIASES.get(at_root, at_root)) for twin in twins} & described:
            missing.add((method, path))
    assert missing == set()


def test_every_alias_matches_its_route(app: Any) -> None:
    assert set(ALIASES) <= {path for _, path in routes(app)}


@pytest.mark.parametrize("key", ["summary", "operationId"])
def test_operation_names_are_unique(paths: dict[str, dict[str, Any]], key: str) -> None:
    counts = Counter(operation[key] for operations in paths.values() for operation in operations.values())
    assert [name for name, number in counts.items() if number > 1] == []


def test_every_parameter_has_a_type(paths: dict[str, dict[str, Any]]) -> None:
    found = {
        (path, parameter["name"]): parameter["schema"].keys() & {"type", "anyOf", "$ref"}
        for path, operations in paths.items()
        for operation in operations.values()
        for parameter in operation.get("parameters", ())
    }
    assert [place for place, kinds in found.items() if not kinds] == []


def test_job_audio_and_dialect_health_are_described(paths: dict[str, dict[str, Any]]) -> None:
    assert {"200", "404", "409"} <= set(paths["/jobs/{job_id}/audio"]["get"]["responses"])
    assert {"200", "500"} <= set(paths["/saos/health"]["get"]["responses"])


def test_audio_comes_first_and_operators_last(app: Any) -> None:
    tags = [tag["name"] for tag in app.openapi()["tags"]]
    assert tags[:2] == ["Stable Audio 3", "Stable Audio 3 jobs"]
    assert tags.index("Operators") > max(tags.index(name) for name in ("Generate", "Files", "Server"))


def test_key_is_entered_once_for_all_operations(app: Any) -> None:
    document = app.openapi()
    # The API page has a field for each scheme. With two fields, users fill in the wrong one.
    (name,) = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][name]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            wants_key = "401" in operation["responses"]
            assert operation["security"] == ([{}, {name: []}] if wants_key else []), path
