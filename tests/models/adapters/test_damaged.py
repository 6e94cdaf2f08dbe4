"""Reading damaged adapter files raises the project's error and needs little memory, whatever their headers state."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.header import inspect_file
from tests.models.adapters.plain import make_base, make_change, write_adapter
from tests.parameters import slow

MOST_BYTES = 64 * 2**20
HUGE = (2**31, 2**40, 2**62, 2**64 - 1, 10**30)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Returns a context in which an allocation fails if the process would grow by more than `MOST_BYTES`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def intact(folder: Path) -> bytes:
    config = {"rank": 2, "alpha": 2, "adapter_type": "dora-rows", "include": ["model"]}
    return write_adapter(
        folder / "intact.safetensors", make_change(make_base(), "dora-rows").tensors, config
    ).read_bytes()


def pack(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def damage(whole: bytes, kind: str, *, random: Random) -> bytes:
    """Returns the file `whole` with one defect of the given kind at a random position."""
    size = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + size], whole[8 + size :]
    header = json.loads(text)
    name = random.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    match kind:
        case "truncated":
            return whole[: random.randrange(len(whole))]
        case "longer":
            return whole + random.randbytes(random.randrange(1, 100))
        case "header size":
            return random.choice([size + 1, size * 2, *HUGE[:4]]).to_bytes(8, "little") + whole[8:]
        case "bits":
            changed = bytearray(text)
            for _ in range(random.randrange(1, 4)):
                changed[random.randrange(size)] ^= 1 << random.randrange(8)
            return pack(bytes(changed), data)
        case "huge shape":
            entry["shape"][random.randrange(len(entry["shape"]))] = random.choice(HUGE)
        case "huge offsets":
            entry["data_offsets"][random.randrange(2)] = random.choice(HUGE)
        case "negative":
            entry[random.choice(["shape", "data_offsets"])][0] = -1
        case "dtype":
            entry["dtype"] = random.choice(["F64", "I64", "BOOL", "F4", "C64", "X", "", None, 3])
        case "entry":
            header[name] = random.choice([None, 3, [], {}, {"dtype": "F16"}, "F16"])
        case "missing":
            del header[name]
        case "duplicate":
            return pack(text[:-1].rstrip(b" }") + b"}," + json.dumps({name: entry}).encode()[1:], data)
        case "noise":
            return pack(random.randbytes(size), data)
        case _:
            raise AssertionError(kind)
    return pack(header, data)


KINDS = (
    "truncated",
    "longer",
    "header size",
    "bits",
    "huge shape",
    "huge offsets",
    "negative",
    "dtype",
    "entry",
    "missing",
    "duplicate",
    "noise",
)


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    intact(tmp_path)
    assert make_base().fit(read_adapter(tmp_path / "intact.safetensors")).rank == 2


@pytest.mark.parametrize("is_header_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_with_little_memory(tmp_path: Path, kind: str, is_header_only: bool) -> None:
    whole, random, base = intact(tmp_path), Random(kind), make_base()

    def read(path: Path) -> None:
        if is_header_only:
            inspect_file(path, name=path.stem)
        else:
            base.fit(read_adapter(path))

    path, errors = tmp_path / "damaged.safetensors", []
    read(tmp_path / "intact.safetensors")  # so that no library is loaded below
    for _ in range(17):
        path.write_bytes(damage(whole, kind, random=random))
        with limited_memory():
            try:
                read(path)
            except InvalidRequestError as error:
                errors.append(error)
    # If the changed bits are in alpha or in spaces, the file stays usable. Changed names of layers cannot be noticed.
    assert len(errors) >= (9 if kind == "bits" else 17)
    assert all("'damaged'" in error.message and error.field == "loras" for error in errors)


@pytest.mark.parametrize("value", [slow(b"[],"), b'{"a":[]},', slow(b'"",'), slow(b"1,")])
def test_a_header_of_many_values_needs_little_memory(tmp_path: Path, value: bytes) -> None:
    text = b'{"a": [' + value * (2**20 // len(value) - 10)
    for size, reason in ((len(text), "corrupt"), (2**22, "header of 4194304 bytes")):
        path = tmp_path / "many.safetensors"
        path.write_bytes(pack(text[:-1].ljust(size - 2) + b"]}", b""))
        with limited_memory(), pytest.raises(InvalidRequestError, match=reason):
            read_adapter(path)


def test_the_memory_limit_of_this_test_works() -> None:
    with limited_memory(), pytest.raises((RuntimeError, MemoryError)):
        torch.zeros(2 * MOST_BYTES, dtype=torch.uint8)
