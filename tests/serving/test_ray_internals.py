"""The start says which Ray is needed where another one lacks what is used of it."""

from __future__ import annotations

import pytest
import ray

from stable_audio_serve.core.errors import StartError
from stable_audio_serve.serving import ray_internals


def test_this_ray_has_what_is_used_of_it() -> None:
    ray_internals.require()
    assert ray.__version__.rpartition(".")[0] in ray_internals.TESTED


@pytest.mark.parametrize("name", ["no_such_name", "ServeControllerClient.no_such_method"])
def test_another_ray_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(ray_internals._NEEDED, "ray.serve._private.client", (name,))
    with pytest.raises(StartError, match=rf"{name}.*2\.60.*constraints") as caught:
        ray_internals.require()
    assert ray.__version__ in caught.value.message
