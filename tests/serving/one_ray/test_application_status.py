"""Our `read_application` returns the same status of an application as Ray Serve's own function."""

from __future__ import annotations

import pytest
from ray import serve

from stable_audio_serve.serving.model_states import read_application

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Model:
    def __init__(self, fault: str = "") -> None:
        if fault:
            raise ValueError(fault)


def deploy(name: str, *, num_replicas: int = 1, fault: str = "") -> None:
    options = {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0}}
    serve.run(serve.deployment(Model).options(**options).bind(fault), name=name, route_prefix=None)


def test_status_equals_that_of_serve(running_serve: None) -> None:
    deploy("works", num_replicas=2)
    with pytest.raises(RuntimeError):
        deploy("fails", fault="no weights")
    for name in ("works", "fails"):
        assert read_application(name) == serve.status().applications[name]
    works = read_application("works")
    assert works is not None
    assert works.deployments["Model"].replica_states == {"RUNNING": 2}
    assert read_application("another") is None
    serve.delete("works")
    serve.delete("fails")
