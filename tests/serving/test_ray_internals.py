"""A server does not start with a version of Ray that lacks private functions which this package uses."""

from __future__ import annotations

import pytest
import ray
from ray.serve.schema import ServeDeploySchema

from stable_audio_serve.core.errors import StartError
from stable_audio_serve.launcher.launch import Stopwatch, _deploy
from stable_audio_serve.serving import ray_internals
from stable_audio_serve.serving.app import assemble


def test_installed_ray_has_all_internals_in_use() -> None:
    ray_internals.require()
    assert ray.__version__.rpartition(".")[0] in ray_internals.TESTED


@pytest.mark.parametrize("name", ["no_such_name", "ServeControllerClient.no_such_method"])
def test_unsuitable_ray_is_refused_by_the_missing_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(ray_internals._NEEDED, "ray.serve._private.client", (name,))
    for start in (
        ray_internals.require,
        lambda: assemble({}, replica=object),  # on a cluster
        lambda: _deploy(ServeDeploySchema(applications=[]), Stopwatch()),  # on one machine
    ):
        with pytest.raises(StartError, match=rf"{name}.*2\.60.*constraints") as caught:
            start()
        assert ray.__version__ in caught.value.message
