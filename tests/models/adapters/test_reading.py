"""Adapter files are read with and without metadata. Errors about other formats and unusable files name the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.models.adapters import header
from stable_audio_serve.models.adapters.adapter import Adapter, read_adapter
from tests.models.adapters.plain import (
    LINEAR,
    OTHER,
    TYPES,
    Change,
    make_base,
    make_change,
    read_change,
    write_adapter,
)

FORMAT = "safetensors file with tensors like model.transformer.layers.0.self_attn.to_qkv.parametrizations.weight.0"
CONDITIONER = "conditioners.seconds_total.embedder.embedding.1"


def read(folder: Path, config: Mapping[str, Any] | None = None, *, kind: str = "lora", **options: Any) -> Adapter:
    """Write an adapter file with random tensors and `config` as its `lora_config`, and read it."""
    return read_adapter(
        write_adapter(folder / "vinyl.safetensors", make_change(make_base(), kind).tensors, config), **options
    )


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read_adapter(path, **options)
    assert caught.value.field == "loras"
    return caught.value.message


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file(dict(tensors), path, metadata=metadata)
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_every_served_type_is_read(tmp_path: Path, kind: str) -> None:
    config = {"rank": 2, "alpha": 5, "adapter_type": kind, "norm_base": "medium"}
    adapter = read(tmp_path, config, kind=kind)
    assert (adapter.name, adapter.type, adapter.rank, adapter.scaling) == ("vinyl", kind, 2, 2.5)
    assert adapter.norm_base == "medium"
    assert adapter.sha256 == hashlib.sha256((tmp_path / "vinyl.safetensors").read_bytes()).hexdigest()
    assert not adapter.warnings
    stored = make_change(make_base(), kind).tensors
    assert {layer: set(parts) for layer, parts in adapter.layers.items()} == {
        layer: set(parts) for layer, parts in stored.items()
    }
    assert all(
        torch.equal(value, stored[layer][part]) for layer in stored for part, value in adapter.layers[layer].items()
    )


@pytest.mark.parametrize("config", [None, {}, {"rank": None, "alpha": None, "adapter_type": None}, {"rank": 2.0}])
def test_missing_values_have_defaults(tmp_path: Path, config: Mapping[str, Any] | None) -> None:
    adapter = read(tmp_path, config)
    assert (adapter.type, adapter.rank, adapter.scaling) == ("lora", 2, 1.0)
    assert not adapter.warnings


def test_ranks_and_alphas_of_other_names_are_a_warning(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"rank": 2, "lora_alpha": 16, "rank_pattern": {}, "dropout": 0.1})
    assert adapter.scaling == 1.0
    named = "its lora_config has lora_alpha, rank_pattern, of which only rank and alpha are read"
    assert adapter.warnings == (f"adapter 'vinyl': {named}",)


def test_warnings_contain_only_printable_characters(tmp_path: Path) -> None:
    assert read(tmp_path, {"rank": 2, "rank\n\x1b[31m": 1}).warnings == (
        "adapter 'vinyl': its lora_config has rank??[31m, of which only rank and alpha are read",
    )


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_the_legacy_type_is_by_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = dict(make_change(make_base(), "dora-rows", layers=[LINEAR]).tensors[LINEAR])
    tensors["magnitude"] = tensors["magnitude"].reshape(shape)
    adapter = read_change(tmp_path, Change("dora", 2.0, 1.0, {LINEAR: tensors}))
    assert adapter.type == "dora-rows"
    assert adapter.layers[LINEAR]["magnitude"].shape == (7,)


def test_the_legacy_type_with_a_row_vector_is_by_columns(tmp_path: Path) -> None:
    tensors = dict(make_change(make_base(), "dora-rows", layers=[LINEAR]).tensors[LINEAR])
    tensors["magnitude"] = torch.ones(1, 11)
    path = write_adapter(tmp_path / "old.safetensors", {LINEAR: tensors}, {"adapter_type": "dora"})
    assert "'old' has type dora-cols, which is not served" in refusal(path)


def test_the_index_in_a_key_is_ignored(tmp_path: Path) -> None:
    parts = make_change(make_base(), "lora", layers=[LINEAR]).tensors[LINEAR]
    path = tmp_path / "third.safetensors"
    save(path, {f"{LINEAR}.parametrizations.weight.2.{part}": value for part, value in parts.items()})
    assert set(read_adapter(path).layers) == {LINEAR}


def test_tensors_of_another_type_are_a_warning(tmp_path: Path) -> None:
    adapter = read(tmp_path, None, kind="dora-rows")
    assert adapter.type == "lora"
    assert set(adapter.layers[LINEAR]) == {"lora_A", "lora_B"}
    assert adapter.warnings == ("adapter 'vinyl': type lora does not use the tensors magnitude",)


def test_conditioners_are_read_on_request(tmp_path: Path) -> None:
    tensors = dict(make_change(make_base(), "lora").tensors)
    path = write_adapter(tmp_path / "a.safetensors", {LINEAR: tensors[LINEAR], CONDITIONER: tensors[OTHER]}, None)
    without, with_them = read_adapter(path), read_adapter(path, with_conditioners=True)
    assert set(without.layers) == {LINEAR}
    assert without.warnings == (f"adapter 'a': its changes of {CONDITIONER} are left out without `conditioner: true`",)
    assert set(with_them.layers) == {LINEAR, CONDITIONER}
    assert not with_them.warnings
    only = write_adapter(tmp_path / "b.safetensors", {CONDITIONER: tensors[OTHER]}, None)
    assert "changes no layer of the denoiser" in refusal(only)


LAYERS = (*(f"model.layers.{number}.to_q" for number in (0, 1, 5, 6, 10)), "model.project_in")


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (None, None, LAYERS),
        ([], [], LAYERS),
        (["layers.[0-5]"], None, LAYERS[:3] + LAYERS[4:5]),  # `layers.1` is a part of `layers.10`, as in the reference
        (["layers[5-0]."], None, LAYERS[:3]),
        (["layers.[0-1].", "project"], ["layers.0."], (LAYERS[1], LAYERS[5])),
        (["project_in"], None, LAYERS[5:]),
        (None, ["layers"], LAYERS[5:]),
    ],
)
def test_patterns_choose_layers(tmp_path: Path, include: Any, exclude: Any, kept: tuple[str, ...]) -> None:
    parts = make_change(make_base(), "lora", layers=[LINEAR]).tensors[LINEAR]
    config = {"include": include, "exclude": exclude}
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", dict.fromkeys(LAYERS, parts), config))
    assert set(adapter.layers) == set(kept)
    assert any("leave out" in warning for warning in adapter.warnings) == (len(kept) < len(LAYERS))
    assert any("is read as 'layers.[5-0].'" in warning for warning in adapter.warnings) == (include == ["layers[5-0]."])


@pytest.mark.parametrize("kind", ["dora-cols", "dora-cols-xs", "bora", "bora-xs", "loha", 7, ["lora"]])
def test_other_types_are_refused_by_name(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(tmp_path, {"adapter_type": kind})
    assert f"'vinyl' has type {kind}" in caught.value.message
    assert "served types: lora, dora-rows, lora-xs, dora-rows-xs" in caught.value.message


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("base_model.model.transformer.layers.0.to_q.lora_A.weight", "PEFT"),
        ("transformer.layers.0.to_q.lora_B.default.weight", "PEFT"),
        ("lora_unet_layers_0_to_q.lora_up.weight", "kohya"),
        ("diffusion_model.layers.0.to_q.lora_down.weight", "kohya"),
        ("model.layers.0.to_q.alpha", "kohya"),
        ("lora_transformer_layers_0_to_q.diff", "kohya"),
        ("lycoris_layers_0_to_q.lokr_w1", "LyCORIS"),
        ("model.layers.0.to_q.hada_w1_a", "LyCORIS"),
        ("transformer.layers.0.to_q_lora.down.weight", "diffusers"),
        ("transformer.layers.0.to_q.lora_A.vinyl.weight", "PEFT"),
        ("pretransform.model.decoder.layers.3.transformers.0.ff_norm.alpha", "is a whole checkpoint, not an adapter"),
        ("model.layers.0.to_q.weight", "model.layers.0.to_q.weight"),
        ("model\n\x1b[31m", "holds model??[31m,"),
    ],
)
def test_other_formats_of_tensors_are_refused_by_name(tmp_path: Path, key: str, named: str) -> None:
    message = refusal(save(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}))
    assert named in message
    assert FORMAT in message


@pytest.mark.parametrize(
    ("file", "data", "named"),
    [
        ("a.gguf", b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
        ("a.ckpt", b"PK\x03\x04" + bytes(100), r"is a pickle (.ckpt)"),
        ("a.safetensors", b"PK\x03\x04" + bytes(100), "is a pickle"),
        ("a.bin", b"\x80\x02}q\x00.", r"is a pickle (.bin)"),
        ("a.safetensors", b"", "is not a safetensors file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is not a safetensors file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, file: str, data: bytes, named: str) -> None:
    path = tmp_path / file
    path.write_bytes(data)
    message = refusal(path, name="bells")
    assert f"'bells' {named}" in message
    assert FORMAT in message


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "there is no file none.safetensors" in refusal(tmp_path / "none.safetensors")
    assert str(tmp_path) not in refusal(tmp_path / "none.safetensors")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is not a file" in refusal(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank 2.5"),
        ({"rank": "2"}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 3}, "does not fit rank 3"),
        ({"rank": 10**400}, "rank"),
        ({"rank": 2**30}, "allowed: 1 to 256"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": 1e30}, "alpha"),
        ({"alpha": "1"}, "alpha"),
        ({"include": 3}, "include"),
        ({"include": ["a", 3]}, "include"),
        ({"include": ["layers.[0-99999]"]}, "too many"),
        ({"exclude": ["[0-99][0-99][0-99]"]}, "too many"),
        ({"include": ["x"] * 2000}, "too many"),
        ({"include": ["nothing"]}, "changes no layer"),
    ],
)
def test_unusable_metadata_is_refused(tmp_path: Path, config: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        read(tmp_path, config)
    assert caught.value.message.startswith("adapter 'vinyl' ")


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 50_000, '{"rank": 2, "rank": 3}'])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    parts = make_change(make_base(), "lora", layers=[LINEAR]).tensors[LINEAR]
    named = {f"{LINEAR}.parametrizations.weight.0.{part}": value for part, value in parts.items()}
    assert "is corrupt or incomplete" in refusal(save(tmp_path / "a.safetensors", named, lora_config=text))


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("lora_A", None, "has no model.first.lora_A, which type dora-rows needs"),
        ("magnitude", None, "has no model.first.magnitude"),
        ("lora_A", torch.ones(3, 11), r"model.first.lora_A of shape \[3, 11\], which does not fit rank 2"),
        ("lora_B", torch.ones(7), r"lora_B of shape \[7\]"),
        ("lora_A", torch.ones(()), "lora_A"),
        ("magnitude", torch.ones(7, 2), "magnitude of shape"),
        ("lora_B", torch.full((7, 2), float("nan")), "values in model.first.lora_B that are not finite"),
        ("magnitude", torch.full((7,), float("inf")), "not finite"),
        ("lora_A", torch.ones(2, 11, dtype=torch.int64), "dtype I64"),
        ("lora_A", torch.ones(2, 11).to(torch.float8_e4m3fn), "dtype F8_E4M3"),
        ("baked_vnorm_row", torch.ones(7, 3), "baked_vnorm_row of shape"),
    ],
)
def test_an_unusable_tensor_is_named(tmp_path: Path, part: str, value: Tensor | None, named: str) -> None:
    tensors = dict(make_change(make_base(), "dora-rows", layers=[LINEAR]).tensors[LINEAR]) | {part: value}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    path = write_adapter(tmp_path / "a.safetensors", {LINEAR: given}, {"adapter_type": "dora-rows", "rank": 2})
    with pytest.raises(InvalidRequestError, match=named):
        read_adapter(path)


def test_one_of_the_singular_bases_is_not_enough(tmp_path: Path) -> None:
    parts = {"M_xs": torch.eye(2), "U": torch.ones(7, 2)}
    path = write_adapter(tmp_path / "a.safetensors", {LINEAR: parts}, {"adapter_type": "lora-xs"})
    assert "has no model.first.V" in refusal(path)


def test_two_adapters_in_a_file_are_refused(tmp_path: Path) -> None:
    parts = make_change(make_base(), "lora", layers=[LINEAR]).tensors[LINEAR]
    both = {f"{LINEAR}.parametrizations.weight.{i}.{part}": v.clone() for i in (0, 1) for part, v in parts.items()}
    assert "several adapters for model.first" in refusal(save(tmp_path / "a.safetensors", both))


def test_rank_and_size_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="has rank 2, allowed: 1 to 1"):
        read(tmp_path, max_rank=1)
    with patch.object(header, "MAX_FILE_BYTES", 100), pytest.raises(InvalidRequestError, match="larger than 100 bytes"):
        read(tmp_path)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "F16", "shape": [1, 1], "data_offsets": [0, 2]})
    key = f"{LINEAR}.parametrizations.weight.0.lora_A"
    header = f'{{"{key}": {entry}, "{key}": {entry}}}'.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    assert "a name occurs twice" in refusal(path)
