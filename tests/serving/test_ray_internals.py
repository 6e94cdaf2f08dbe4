"""A server does not start with a version of Ray that lacks private functions which this package uses."""

from __future__ import annotations

import pytest
import ray

from stable_audio_serve.core.errors import StartError
from stable_audio_serve.serving import ray_internals


def test_installed_ray_has_all_internals_in_use() -> None:
    ray_internals.require()
    assert ray.__version__.rpartition(".")[0] in ray_internals.TESTED


@pytest.mark.parametrize("name", ["no_such_name", "ServeControllerClient.no_such_method"])
def test_unsuitable_ray_is_refused_by_the_missing_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(ray_internals._NEEDED, "ray.serve._private.client", (name,))
    with pytest.raises(StartError, match=rf"{name}.*2\.60.*constraints") as caught:
        ray_internals.require()
    assert ray.__version__ in caught.value.message
