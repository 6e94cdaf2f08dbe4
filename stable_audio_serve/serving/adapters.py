"""Implements `core.adapters.AdapterLibrary`.

An adapter comes from the configuration, from a model's adapter folder, or was loaded at run time. The names of adapters
that were loaded at run time are in the job database. Every process that answers HTTP requests has its own library,
which looks at the database, the folders and the files twice a second. This module does not import torch, because it
reads only the headers of adapter files.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stable_audio_serve.artifacts.s3_client import make_client
from stable_audio_serve.core.adapters import AdapterCard
from stable_audio_serve.core.catalog import ADAPTER_NAME, ModelCard, ModelCatalog
from stable_audio_serve.core.errors import (
    ConflictError,
    InvalidRequestError,
    ModelUnavailableError,
    NotFoundError,
    StorageError,
)
from stable_audio_serve.core.generation import Lora
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.jobs.store.loaded_adapters import AdapterStore, LoadedAdapter
from stable_audio_serve.models.adapters.header import SUFFIX, inspect_file
from stable_audio_serve.models.adapters.sources import fetch_adapter, is_remote

logger = logging.getLogger(__name__)

_READ_EVERY_S = 0.5  # seconds between two looks, which take 0.4 ms if there are 10 files
_DATABASE_RETRY_S = 2.0  # further seconds until the next look after an error of the database, which is logged
_SPREAD_S = 1.5  # seconds after which every process has read a change of the database
_RETRY_S = 60.0  # seconds until a source that could not be downloaded is tried again
_CHECK_AGAIN_S = 600.0  # seconds until a downloaded source is fetched again, because it may have changed
_READY_IN_S = 5.0  # seconds in which most downloads end
_MAX_FILES = 1000  # number of files of an adapter folder that are served

Fetch = Callable[[str], Path]


def adapter_fetcher(settings: Settings) -> Fetch:
    """Return `fetch_adapter` with the configured credentials: a function from an adapter's source to a local file."""
    return partial(fetch_adapter, token=settings.hub_token, open_s3=partial(make_client, settings.storage))


@dataclass(frozen=True, slots=True)
class _Named:
    """An adapter whose file is not read yet.

    `origin` completes the sentence "The adapter is ..." in error messages, for example "part of the configuration".
    """

    name: str
    source: str
    origin: str
    has_conditioners: bool = False


@dataclass(frozen=True, slots=True)
class _Looked:
    """The card made from an adapter's file, and the file's `_state_of` when it was read (None for a download).

    `named` is the adapter. A downloaded source is fetched again at `retry_at`.
    """

    named: _Named
    state: tuple[int, ...] | None
    card: AdapterCard
    retry_at: float = float("inf")


class Library:
    """The adapters of the models in `catalog`. Of the public methods without `async`, only `start` blocks."""

    def __init__(
        self,
        settings: Settings,
        catalog: ModelCatalog,
        *,
        store: AdapterStore | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        """Reads nothing yet. Without `store`, no adapters can be loaded while running."""
        self._models = {catalog.find(model.name).name: model for model in settings.models}
        self._adaptable = {card.name for card in catalog if card.takes_adapters}
        self._store = store
        is_shared = settings.ingress.replicas > 1 or settings.jobs.database_url is not None  # also by other servers
        self._spread_s = _SPREAD_S if is_shared else 0.0
        self._fetch = fetch or adapter_fetcher(settings)
        self._loaded: tuple[LoadedAdapter, ...] = ()
        self._looked: dict[tuple[str, str], _Looked] = {}  # by the names of model and adapter
        self._warned: set[str] = set()
        self._lock = asyncio.Lock()

    @property
    def warnings(self) -> Sequence[str]:
        """The problems of folders and files that were found so far."""
        return sorted(self._warned)

    def cards(self, model: str | None = None) -> Sequence[AdapterCard]:
        return [looked.card for (name, _), looked in sorted(self._looked.items()) if model in (None, name)]

    def resolve(self, model: ModelCard, loras: Sequence[Lora]) -> tuple[Lora, ...]:
        if not loras:
            return ()
        if not model.takes_adapters:
            raise _refuse(f"the model {model.name} takes no adapters", allowed="none")
        settings = self._models.get(model.name) or ModelSettings(name=model.name)
        if len(loras) > settings.max_loras:
            raise _refuse(f"at most {settings.max_loras} adapters are allowed", allowed=f"{settings.max_loras}")
        found = [(lora, self._find(model.name, lora.name)) for lora in loras]
        resolved = tuple(_resolve(replace(lora, name=card.name), card) for lora, card in found)
        rank = sum(card.rank for lora, card in found if lora.strength)
        if rank > settings.max_lora_rank:
            allowed = f"up to {settings.max_lora_rank}"
            raise _refuse(f"the ranks of the adapters add up to {rank}, allowed: {allowed}", allowed=allowed)
        return resolved

    def _find(self, model: str, name: str) -> AdapterCard:
        """Return the adapter that has this name, or that was loaded from this URL or Hugging Face repository.

        Raises InvalidRequestError if there is none, or if the adapter's file is unusable, and StorageError until the
        source has answered for the first time.
        """
        known = {adapter: looked.card for (owner, adapter), looked in self._looked.items() if owner == model}
        by_source = (card for card in known.values() if card.source == name and is_remote(name))
        card = known.get(name) or next(by_source, None)
        if card is None:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:20]
            names = ", ".join(near) or "none"
            raise _refuse(f"the model {model} has no adapter {name[:100]!r}; near names: {names}", allowed=names)
        if card.is_awaited:
            raise StorageError(f"{card.problem}; retry", retry_after_s=_READY_IN_S)
        if card.problem is not None:
            raise _refuse(card.problem)
        return card

    async def load(self, model: ModelCard, *, name: str, source: str) -> AdapterCard:
        """See `AdapterLibrary.load`. Raises StorageError."""
        if self._store is None:
            raise ModelUnavailableError("this server has no database to keep adapters in")
        if not model.takes_adapters:
            raise _refuse(f"the model {model.name} takes no adapters", allowed="none")
        _require_name(name)
        if not is_remote(source) and not os.path.isabs(source):
            raise _refuse(f"adapter source {source[:300]!r}: a path must be absolute", allowed="an absolute path")
        await self._read_again()
        known = self._looked.get((model.name, name))
        if known is not None and known.card.source != source:
            raise ConflictError(
                f"the adapter {name!r} has already been loaded: it is {known.named.origin}", code="adapter_exists"
            )
        named = known.named if known is not None else _Named(name, source, "loaded from another source")
        looked = await asyncio.to_thread(self._look, model.name, named)
        if looked.card.problem is not None:
            raise _refuse(looked.card.problem)
        if known is None:
            stored = await asyncio.to_thread(self._store.add, LoadedAdapter(model.name, name, source))
            if stored.source != source:
                raise ConflictError(f"the adapter {name!r} has already been loaded", code="adapter_exists")
            await asyncio.sleep(self._spread_s)
        async with self._lock:
            self._looked[model.name, name] = looked
        await self._read_again()
        return looked.card

    async def unload(self, model: ModelCard, *, name: str) -> None:
        """See `AdapterLibrary.unload`. Raises StorageError."""
        removed = self._store is not None and await asyncio.to_thread(self._store.remove, model.name, name)
        await self._read_again()
        known = self._looked.get((model.name, name))
        if known is not None and not removed:
            message = f"the adapter {name!r} cannot be unloaded: it is {known.named.origin}"
            raise ConflictError(message, code="kept_by_configuration", field="lora_name")
        if not removed:
            raise NotFoundError(f"the model {model.name} has no adapter {name[:100]!r}", field="lora_name")
        await asyncio.sleep(self._spread_s)

    def start(self) -> None:
        """Read the database and all adapter files that need no download. Blocks. `follow` downloads the others."""
        with suppress(StorageError):
            self._read()

    async def follow(self) -> None:
        """Keep the library up to date until the task is cancelled."""
        while True:
            try:
                await self.refresh()
            except StorageError:
                await asyncio.sleep(_DATABASE_RETRY_S)
            except Exception as error:  # noqa: BLE001 - one adapter's error must not end the task
                self._warn(f"adapters cannot be read: {error!r}")
            await asyncio.sleep(_READ_EVERY_S)

    async def refresh(self) -> None:
        """Read the database, the folders, and the files that have changed. Then download the files that are due.

        If the database cannot be read, everything else is done, and then StorageError is raised.
        """
        try:
            await self._read_again()
        finally:
            due = [(key, before) for key, before in self._looked.items() if time.monotonic() >= before.retry_at]
            for key, before in due:
                looked = await asyncio.to_thread(self._look, key[0], before.named, before=before)
                async with self._lock:
                    if self._looked.get(key) is before:  # else it was removed or loaded in the meantime
                        self._looked[key] = looked

    async def _read_again(self) -> None:
        """As `refresh`, without downloads, so that loading and unloading need not wait for them."""
        async with self._lock:
            await asyncio.to_thread(self._read)

    def _read(self) -> None:
        try:
            if self._store is not None:
                self._loaded = self._store.read()
        finally:
            self._scan()

    def _scan(self) -> None:
        """Read the folders, and the files that are new or have changed. Downloads nothing."""
        looked: dict[tuple[str, str], _Looked] = {}
        for model, settings in self._models.items():
            for named in self._named(model, settings):
                if (key := (model, named.name)) not in looked:
                    before = self._looked.get(key)
                    before = before if before is not None and before.named == named else None
                    looked[key] = self._look(model, named, before=before, may_download=False)
        self._looked = looked

    def _named(self, model: str, settings: ModelSettings) -> Iterator[_Named]:
        """Yield the adapters of a model. If several have the same name, the caller must use only the first."""
        if model not in self._adaptable:
            if settings.loras or settings.lora_folder is not None:
                self._warn(f"the model {model} takes no adapters; those in its configuration are not served")
            return
        for name, one in settings.loras.items():
            yield _Named(name, one.path, "part of the configuration", one.conditioner)
        for loaded in self._loaded:
            if loaded.model == model:
                yield _Named(loaded.name, loaded.source, "loaded from another source")
        if settings.lora_folder is not None:
            for path in self._list(Path(settings.lora_folder)):
                yield _Named(path.stem, str(path), f"in the folder of the model's adapters ({path.name})")

    def _list(self, folder: Path) -> list[Path]:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        except OSError as error:
            self._warn(f"the adapter folder {folder} cannot be read: {error.strerror}")
            return []
        if len(paths) > _MAX_FILES:
            self._warn(f"the adapter folder {folder} has more than {_MAX_FILES} files; the others are not served")
        usable = [
            path for path in paths[:_MAX_FILES] if path.stem.isprintable() and re.fullmatch(ADAPTER_NAME, path.stem)
        ]
        for path in set(paths[:_MAX_FILES]).difference(usable):
            self._warn(
                f"the adapter file {path.name!a} is not served: its name has a colon, plus sign or control character, "
                "or is not UTF-8"
            )
        return usable

    def _look(self, model: str, named: _Named, *, before: _Looked | None = None, may_download: bool = True) -> _Looked:
        """Return the adapter's card and the state of its file.

        If the file was looked at `before`, reads it only if it has changed, or if its download is due again.
        """
        state = None if is_remote(named.source) else _state_of(named.source)
        if before is not None and before.state == state and (time.monotonic() < before.retry_at or not may_download):
            return before
        card = AdapterCard(named.name, model, named.source, has_conditioners=named.has_conditioners)
        settings = self._models[model]
        if state is None and not may_download:
            awaited = replace(card, problem=f"adapter {named.name!r} is being downloaded", is_awaited=True)
            return _Looked(named, state, awaited, retry_at=float("-inf"))
        try:
            path = self._fetch(named.source)
            facts = inspect_file(
                path, name=named.name, max_rank=settings.max_lora_rank, with_conditioners=named.has_conditioners
            )
        except Exception as error:  # noqa: BLE001 - one adapter's error must not keep others from being read
            label = f"adapter {named.name!r}"
            message = error.message if isinstance(error, InvalidRequestError) else f"cannot be read: {error!r}"
            problem = message if label in message else f"{label}: {message}"
            self._warn(f"model {model}: {problem}")
            if state is not None:
                return _Looked(named, state, replace(card, problem=problem))
            is_away = isinstance(error, InvalidRequestError) and error.retry_after_s is not None
            failed = replace(card, problem=problem, is_awaited=is_away)
            known = before.card if before is not None and before.card.problem is None else failed
            return _Looked(named, None, known, time.monotonic() + _RETRY_S)
        header = facts.header
        for warning in header.warnings:
            self._warn(f"model {model}: {warning}")
        card = replace(card, type=header.type, rank=header.rank, sha256=facts.sha256, num_bytes=facts.num_bytes)
        return _Looked(named, state, card, float("inf") if state is not None else time.monotonic() + _CHECK_AGAIN_S)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _state_of(source: str) -> tuple[int, ...]:
    """Return a tuple that changes when the file is written or replaced. () if there is no file.

    It has the time of the last change of the inode, because `cp -p` keeps the time of the last write.
    """
    try:
        stat = os.stat(source)
    except (OSError, ValueError):
        return ()
    return stat.st_ctime_ns, stat.st_size, stat.st_ino


def _require_name(name: str) -> None:
    if re.fullmatch(ADAPTER_NAME, name) is None or not name.isprintable():
        allowed = "1 to 100 printable characters without colons, plus signs and slashes"
        raise InvalidRequestError(f"lora_name must have {allowed}", field="lora_name", allowed=allowed)


def _resolve(lora: Lora, card: AdapterCard) -> Lora:
    """Return a request's adapter `lora` with the source and the hash of `card`.

    Raises InvalidRequestError if a value is out of range, or if the request asks for a file with another hash.
    """
    low, high = card.strengths
    if not low <= lora.strength <= high:
        allowed = f"{low:g} to {high:g}"
        message = f"adapter {card.name!r} of type {card.type} has strength {lora.strength:g}, allowed: {allowed}"
        raise _refuse(message, allowed=allowed)
    if not 0 <= lora.interval[0] <= lora.interval[1] <= 1:
        message = f"adapter {card.name!r} has the interval {list(lora.interval)}: 0 <= low <= high <= 1 must hold"
        raise _refuse(message, allowed="0 <= low <= high <= 1")
    if lora.sha256 not in ("", card.sha256):
        message = f"adapter {card.name!r} is another file than the one asked for: its SHA-256 is {card.sha256}"
        raise _refuse(message, allowed=lora.sha256)
    if lora.sha256 and lora.has_conditioners != card.has_conditioners:
        use = "also uses" if card.has_conditioners else "does not use"
        raise _refuse(f"adapter {card.name!r} {use} its tensors for conditioners, unlike the one asked for")
    return replace(lora, source=card.source, sha256=card.sha256, has_conditioners=card.has_conditioners)


def _refuse(message: str, *, allowed: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(message, field="loras", allowed=allowed)
