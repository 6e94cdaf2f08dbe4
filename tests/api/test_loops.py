"""Requests for clips that repeat without a seam: the fields `loop`, `bpm` and `bars` of the native API."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.backends import ToneBackend

ROUTES = ("/v1/audio/generations", "/jobs")


@pytest.mark.parametrize(
    ("fields", "loop", "duration_s"),
    [
        ({"loop": True, "duration": 2.5}, "free", 2.5),
        ({"loop": True}, "free", 7.0),
        ({"loop": False, "duration": 2}, None, 2.0),
        ({"loop": None, "bpm": None, "bars": None, "duration": 2}, None, 2.0),
        ({"loop": True, "bpm": 120, "bars": 2}, "bars", 4.0),
        ({"loop": True, "bpm": 92.5, "bars": 1}, "bars", 240 / 92.5),
        ({"loop": True, "bpm": 70, "bars": 1, "duration": 3.4286}, "bars", 240 / 70),
        ({"loop": True, "duration": 119.95}, "free", 119.95),
    ],
)
@pytest.mark.usefixtures("low_rate")
async def test_loop_fields(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], loop: str | None, duration_s: float
) -> None:
    reply = await client.post(ROUTES[0], json={"prompt": "a tone", **fields})
    assert reply.status_code == 200, reply.text
    assert (backend.last.loop, backend.last.duration_s) == (loop, duration_s)
    recipe = httpx.Response(200, content=reply.headers["x-recipe"]).json()
    assert recipe.get("loop") == loop
    replay = await client.post("/v1/audio/replay", json=recipe)
    assert (replay.status_code, backend.last.loop) == (200, loop)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"loop": True, "bpm": 120}, "bars"),
        ({"loop": True, "bars": 2}, "bpm"),
        ({"bpm": 120, "bars": 2}, "loop"),
        ({"loop": True, "bpm": 120, "bars": 2, "duration": 5}, "duration"),
        ({"loop": True, "bpm": 0, "bars": 2}, "bpm"),
        ({"loop": True, "bpm": 120, "bars": 0}, "bars"),
        ({"loop": True, "bpm": 120, "bars": 1.5}, "bars"),
        ({"loop": True, "bpm": 60, "bars": 30}, "bars"),
        ({"loop": True, "duration": 120}, "duration"),
        ({"loop": "maybe"}, "loop"),
    ],
)
async def test_contradicting_loop_fields_are_refused_by_name(
    client: httpx.AsyncClient, route: str, fields: dict[str, Any], field: str
) -> None:
    reply = await client.post(route, json={"prompt": "a tone", **fields})
    assert reply.status_code == 422, reply.text
    assert field in [fault["loc"][-1] for fault in reply.json()["detail"]]
