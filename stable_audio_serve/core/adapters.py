"""The adapters that requests may name, and the interface through which the HTTP layer finds and changes them.
`serving.adapters` implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError, NotFoundError
from stable_audio_serve.core.generation import Lora


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """Public properties of one adapter of one model.

    `source` is the location of the adapter's file, see `Lora.source`. `type`, `rank` and `sha256` come from the file.
    If the file cannot be used, `problem` is the reason, `type` is empty and `rank` is 0. Otherwise `problem` is None.
    `is_awaited` is true until the source of the file has answered for the first time.
    """

    name: str
    model: str
    source: str
    type: str = ""
    rank: int = 0
    sha256: str = ""
    num_bytes: int = 0
    has_conditioners: bool = False
    problem: str | None = None
    is_awaited: bool = False

    @property
    def public_source(self) -> str:
        """The source without the folders of this machine."""
        return PurePath(self.source).name if PurePath(self.source).is_absolute() else self.source

    @property
    def strengths(self) -> tuple[float, float]:
        """The lowest and the highest strength that the adapter's type allows."""
        return strength_range(self.type)


def strength_range(adapter_type: str) -> tuple[float, float]:
    """Return the lowest and the highest strength that adapters of this type may have."""
    return (-2.0 if adapter_type in ("lora", "lora-xs") else 0.0), 2.0


class AdapterLibrary(Protocol):
    """The adapters of all models."""

    def cards(self, model: str | None = None) -> Sequence[AdapterCard]:
        """Return the adapters of the model with this canonical name, or of all models. Sorted by adapter name."""
        ...

    def resolve(self, model: ModelCard, loras: Sequence[Lora]) -> tuple[Lora, ...]:
        """Return the adapters of a request with the sources and hashes of their files.

        Raises InvalidRequestError, whose field is `loras`, for an unknown name, too many adapters, a strength, rank or
        interval out of range, a file that cannot be used, and a model without adapters. Also raises it if an entry has
        a `sha256` that differs from the hash of the adapter's file. Raises StorageError until the source of a file has
        answered for the first time.
        """
        ...

    async def load(self, model: ModelCard, *, name: str, source: str) -> AdapterCard:
        """Add an adapter in all processes of the server, until `unload` removes it.

        Raises InvalidRequestError if the file cannot be used, and ConflictError if an adapter with this name has
        another file.
        """
        ...

    async def unload(self, model: ModelCard, *, name: str) -> None:
        """Remove an adapter that `load` added. Raises NotFoundError if no adapter has this name.

        Raises ConflictError if the adapter comes from the configuration or from a folder.
        """
        ...


class NoAdapters:
    """The library of a server without adapters."""

    def cards(self, model: str | None = None) -> Sequence[AdapterCard]:
        return ()

    def resolve(self, model: ModelCard, loras: Sequence[Lora]) -> tuple[Lora, ...]:
        if loras:
            message = f"adapter {loras[0].name[:100]!r} is unknown: the model {model.name} has no adapters"
            raise InvalidRequestError(message, field="loras", allowed="none")
        return ()

    async def load(self, model: ModelCard, *, name: str, source: str) -> AdapterCard:
        raise InvalidRequestError("this server loads no adapters", field="lora_name")

    async def unload(self, model: ModelCard, *, name: str) -> None:
        raise NotFoundError(f"the model {model.name} has no adapter {name[:100]!r}")
