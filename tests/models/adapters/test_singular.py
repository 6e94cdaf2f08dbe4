"""Singular vectors of weights are computed once for each network and rank, and stored for later processes."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stable_audio_serve.models.adapters import singular
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.base import Base
from stable_audio_serve.models.adapters.singular import SingularBases, SingularBasis
from tests.factories import FakeClock
from tests.models.adapters.plain import LINEAR, Net, make_base, make_change, write_adapter


def make_layers(seed: int = 0) -> dict[str, nn.Module]:
    """Returns three layers with random weights (9, 6)."""
    torch.manual_seed(seed)
    return {name: nn.Linear(6, 9) for name in ("one", "two", "three")}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Returns a list that receives the shape of each weight whose vectors are computed."""
    exact, shapes = singular.singular_basis, []

    def count(weight: Tensor, rank: int) -> SingularBasis:
        shapes.append(tuple(weight.shape))
        return exact(weight, rank)

    monkeypatch.setattr(singular, "singular_basis", count)
    return shapes


def assert_equal(found: dict[str, SingularBasis], expected: dict[str, SingularBasis]) -> None:
    assert found.keys() == expected.keys()
    for name, basis in expected.items():
        assert torch.equal(found[name].u, basis.u)
        assert torch.equal(found[name].v, basis.v)
        assert found[name].is_ambiguous == basis.is_ambiguous


def test_a_later_process_computes_only_new_layers(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    folder = tmp_path / "vectors"
    first = SingularBases(make_layers(), folder=folder).compute(["one", "two"], 2)
    assert len(computed) == 2
    assert_equal(SingularBases(make_layers(), folder=folder).compute(["one", "two"], 2), first)
    assert len(computed) == 2
    SingularBases(make_layers(), folder=folder).compute(["two", "three"], 2)
    assert len(computed) == 3
    SingularBases(make_layers(), folder=folder).compute(["one", "two", "three"], 2)
    assert len(computed) == 3


def test_other_weights_and_other_ranks_have_their_own_vectors(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    expected = SingularBases(make_layers(seed=1)).compute(["one"], 2)
    SingularBases(make_layers(), folder=tmp_path).compute(["one"], 2)
    assert_equal(SingularBases(make_layers(seed=1), folder=tmp_path).compute(["one"], 2), expected)
    assert SingularBases(make_layers(), folder=tmp_path).compute(["one"], 3)["one"].u.shape == (9, 3)
    assert len(computed) == 4


@pytest.mark.parametrize("damage", ["cut short", "one byte", "empty", "another format"])
def test_a_damaged_file_is_computed_again(
    tmp_path: Path, damage: str, computed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    expected = SingularBases(make_layers(), folder=tmp_path).compute(["one"], 2)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    changed = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    path.write_bytes(
        {"cut short": data[:-8], "one byte": changed, "empty": b"", "another format": b"pickle" * 20}[damage]
    )
    for _ in range(2):
        assert_equal(SingularBases(make_layers(), folder=tmp_path).compute(["one"], 2), expected)
    assert len(computed) == 2
    assert len(caplog.messages) == 1
    assert "damaged" in caplog.text


def test_vectors_are_computed_once_even_on_a_full_disk(
    tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bases = SingularBases(make_layers(), folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(singular, "save_file", fail)
        for _ in range(2):
            bases.compute(["one", "two"], 2)
    assert len(computed) == 2
    bases.compute(["two", "three"], 2)
    SingularBases(make_layers(), folder=tmp_path).compute(["one", "two", "three"], 2)
    assert len(computed) == 3


def test_only_their_owner_can_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "vectors"
    SingularBases(make_layers(), folder=folder).compute(["one"], 2)
    (path,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def test_a_folder_of_everyone_is_not_used(
    tmp_path: Path, computed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    bases = SingularBases(make_layers(), folder=tmp_path)
    for _ in range(2):
        bases.compute(["one"], 2)
    assert not list(tmp_path.iterdir())
    assert len(computed) == 1
    assert "cannot be used" in caplog.text


def test_progress_is_logged_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, exact = FakeClock(), singular.singular_basis

    def take_four_seconds(weight: Tensor, rank: int) -> SingularBasis:
        clock.now += 4.0
        return exact(weight, rank)

    monkeypatch.setattr(singular, "singular_basis", take_four_seconds)
    layers = {f"layer {number}": nn.Linear(3, 4) for number in range(5)}
    with caplog.at_level(logging.INFO):
        SingularBases(layers, clock=clock).compute(layers, 2)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "2 of 5 layers after 8 s",
        "4 of 5 layers after 16 s",
    ]


def test_an_adapter_is_fitted_with_stored_vectors(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    change = make_change(make_base(), "lora-xs", layers=[LINEAR])
    config = {"adapter_type": "lora-xs", "rank": change.rank, "alpha": change.alpha}
    adapter = read_adapter(write_adapter(tmp_path / "small.safetensors", change.tensors, config))
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        base = Base("small", {"model.": Net().requires_grad_(False)}, folder=tmp_path / "vectors")
        made.append(base.fit(adapter).layers[LINEAR])
    assert len(computed) == 1
    assert torch.equal(made[0].a, made[1].a)
    assert torch.equal(made[0].b, made[1].b)
