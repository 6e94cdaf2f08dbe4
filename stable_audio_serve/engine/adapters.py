"""Loads the adapters that requests name, and folds the adapters that apply together into one slot. Keeps adapters and
slots in memory for later requests. Loading and folding run on a separate thread, so that the engine's thread does not
wait for them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import InvalidRequestError, OverloadedError, StorageError, engine_stopped
from stable_audio_serve.core.generation import GenerationRequest, Lora, Stacking
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.base import Base, FittedAdapter
from stable_audio_serve.models.adapters.fold import Slot, fold
from stable_audio_serve.models.adapters.singular import SINGULAR_VECTORS
from stable_audio_serve.models.protocol import AdaptableModel, DiffusionModel
from stable_audio_serve.sampling.plan import Evaluation

log = logging.getLogger(__name__)

_FULL_RETRY_S = 2.0
_MOST_WAITING = 32  # how many requests may wait for adapters at the same time; of one client, a quarter of this


@dataclass(frozen=True, slots=True)
class HeldSlots:
    """The slots (folded adapters) of one request. `by_evaluation` has the slot of each evaluation, or None where no
    adapter applies; it is empty if the request has no adapters. The slots stay in memory until `release`, which must be
    called once.
    """

    by_evaluation: Sequence[Slot | None] = ()
    release: Callable[[], None] = lambda: None

    @property
    def is_constant(self) -> bool:
        """Whether all evaluations have the same slot."""
        return len({id(slot) for slot in self.by_evaluation}) <= 1


@dataclass(slots=True)
class _Entry:
    value: FittedAdapter | Slot
    num_users: int = 0


@dataclass(slots=True)
class _Cache:
    """Adapters and slots by key, in order of their last use. Thread-safe."""

    max_bytes: int
    metrics: Metrics
    before_drop: Callable[[], None]
    _entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict)
    _num_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, key: Hashable) -> FittedAdapter | Slot | None:
        """Return the value, or None if it is not in the cache. The value counts one more user until `give_back`."""
        with self._lock:
            if (entry := self._entries.get(key)) is None:
                return None
            self._entries.move_to_end(key)
            entry.num_users += 1
            return entry.value

    def put(self, key: Hashable, value: FittedAdapter | Slot, *, name: str, num_users: int = 0) -> None:
        """Add a value. If it does not fit, drop values that have no users, the least recently used first.

        Raises InvalidRequestError if the value alone is larger than the cache, and OverloadedError if the values in use
        leave too little memory for it.
        """
        with self._lock:
            if value.nbytes > self.max_bytes:
                raise InvalidRequestError(
                    f"adapter {name!r} takes {value.nbytes} bytes, lora_cache_bytes allows {self.max_bytes}",
                    field="loras",
                    allowed=f"{self.max_bytes} bytes",
                )
            unused = [key for key, entry in self._entries.items() if not entry.num_users]
            over = self._num_bytes + value.nbytes - self.max_bytes
            if over > sum(self._entries[key].value.nbytes for key in unused):
                message = "the memory for adapters (lora_cache_bytes) is in use by other requests"
                raise OverloadedError(message, retry_after_s=_FULL_RETRY_S)
            if over > 0:
                self.before_drop()
            for old in unused:
                if over <= 0:
                    break
                over -= self._entries[old].value.nbytes
                self._num_bytes -= self._entries.pop(old).value.nbytes
            self._entries[key] = _Entry(value, num_users)
            self._num_bytes += value.nbytes
            self.metrics.gauge("engine_adapter_bytes", self._num_bytes)
            self.metrics.gauge("engine_adapter_slots", sum(isinstance(e.value, Slot) for e in self._entries.values()))

    def hashes(self) -> list[str]:
        """Returns the hashes of all adapters."""
        with self._lock:
            values = [entry.value for entry in self._entries.values()]
        return [value.sha256 for value in values if isinstance(value, FittedAdapter)]

    def give_back(self, keys: Sequence[Hashable]) -> None:
        """Count one user less of each key."""
        with self._lock:
            for key in keys:
                self._entries[key].num_users -= 1


class Adapters:
    """The adapters of one model in one engine. `acquire` may be called from any event loop."""

    def __init__(
        self,
        model: DiffusionModel,
        *,
        max_bytes: int,
        max_rank: int,
        fetch: Callable[[str], Path],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`fetch` returns the file of an adapter's source, and downloads it if necessary. `max_rank` limits the total
        rank of the adapters that apply together.
        """
        self._model = model
        self._max_rank = max_rank
        self._fetch = fetch
        self._clock = clock
        self._metrics = metrics
        self._lock = threading.Lock()
        self._num_waiting: Counter[str] = Counter()  # by client
        self._cache = _Cache(max_bytes, metrics, before_drop=self._finish_device_work)
        # One thread, so that requests for the same adapter load it once. With one core, folding is the same everywhere.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=lambda: torch.set_num_threads(1))

    @cached_property
    def base(self) -> Base:
        """The adaptable layers of the model. Raises InvalidRequestError if the model has none."""
        name = self._model.spec.card.name
        networks = self._model.adaptable if isinstance(self._model, AdaptableModel) else {}
        if not networks:
            raise InvalidRequestError(f"the model {name} takes no adapters", field="loras", allowed="none")
        return Base(name, networks, folder=SINGULAR_VECTORS)

    async def acquire(self, request: GenerationRequest, evaluations: Sequence[Evaluation]) -> HeldSlots:
        """Return the slots for these evaluations of a request. Loads and folds adapters that are not in memory.

        Raises InvalidRequestError for adapters that cannot be used, StorageError for those that cannot be downloaded,
        OverloadedError if adapters in use take too much memory or too many requests are waiting for adapters, and
        ModelUnavailableError if the engine closes.
        """
        if not request.loras:
            return HeldSlots()
        _ = self.base
        stacking = request.lora_stacking or "chained"
        active = [_active(request.loras, evaluation.t) for evaluation in evaluations]
        if (held := self._hold_cached(active, stacking=stacking)) is not None:
            return held
        with self._waiting(request.client):
            try:
                job: Future[HeldSlots] = self._pool.submit(self._hold, active, stacking)
            except RuntimeError as error:  # the engine was closed
                raise engine_stopped() from error
            try:
                return await asyncio.wrap_future(job)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and not task.cancelling():  # `close` cancelled the job, not the request
                    raise engine_stopped() from error
                job.add_done_callback(_release_result)
                raise

    @contextmanager
    def _waiting(self, client: str) -> Iterator[None]:
        """Count a request that waits for adapters within this context.

        Raises OverloadedError if too many requests of all clients, or of this client, are waiting. An anonymous client
        (the empty name) has no limit of its own.
        """
        with self._lock:
            own, all_ = self._num_waiting[client] if client else 0, self._num_waiting.total()
            if all_ >= _MOST_WAITING or own >= _MOST_WAITING // 4:
                message = "too many requests wait for adapters that are not in memory"
                raise OverloadedError(message, retry_after_s=_FULL_RETRY_S)
            self._num_waiting[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_waiting[client] -= 1
                self._num_waiting += Counter()  # drops clients that wait no more

    def hashes(self) -> list[str]:
        """Returns the hashes of the adapter files in memory."""
        return self._cache.hashes()

    def close(self) -> None:
        """Stop the loading thread. Slots that requests hold stay usable."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _hold_cached(self, active: Sequence[tuple[Lora, ...]], *, stacking: Stacking) -> HeldSlots | None:
        """Return the slots for these evaluations if all of them are in memory, else None.

        Also returns None if the request does not give the hash of every adapter's file.
        """
        distinct = [loras for loras in dict.fromkeys(active) if loras]
        if not all(lora.sha256 for loras in distinct for lora in loras):
            return None
        keys = [self._slot_key(loras, stacking) for loras in distinct]
        found: list[Slot] = []
        for key in keys:
            slot = self._cache.take(key)
            if slot is None:
                self._cache.give_back(keys[: len(found)])
                return None
            assert isinstance(slot, Slot)
            found.append(slot)
        slots = dict(zip(distinct, found, strict=True))
        return HeldSlots([slots.get(loras) for loras in active], lambda: self._cache.give_back(keys))

    def _hold(self, active: Sequence[tuple[Lora, ...]], stacking: Stacking) -> HeldSlots:
        slots: dict[tuple[Lora, ...], Slot] = {}
        held: list[Hashable] = []
        try:
            with torch.inference_mode():
                for loras in filter(None, dict.fromkeys(active)):
                    key = self._slot_key(loras, stacking)
                    slots[loras] = self._slot(key, loras=loras, stacking=stacking)
                    held.append(key)
        except BaseException:
            self._cache.give_back(held)
            raise
        return HeldSlots([slots.get(loras) for loras in active], lambda: self._cache.give_back(held))

    def _slot_key(self, loras: Sequence[Lora], stacking: Stacking) -> Hashable:
        return (stacking, tuple((_identity(lora, self._file), lora.strength) for lora in loras))

    def _slot(self, key: Hashable, *, loras: Sequence[Lora], stacking: Stacking) -> Slot:
        """Returns a slot with one more user."""
        if (found := self._cache.take(key)) is None:
            chain = [(self._adapter(lora), lora.strength) for lora in loras]
            began = self._clock.monotonic()
            found = fold(self.base, chain, stacking=stacking, max_rank=self._max_rank)
            self._finish_device_work()
            self._metrics.observe("engine_adapter_fold_ms", 1000.0 * (self._clock.monotonic() - began))
            for warning in found.warnings:
                log.warning(warning)
            self._cache.put(key, found, name="+".join(lora.name for lora in loras), num_users=1)
        assert isinstance(found, Slot)
        return found

    def _adapter(self, lora: Lora) -> FittedAdapter:
        key = _identity(lora, self._file)
        if (found := self._cache.take(key)) is not None:
            self._cache.give_back([key])  # needs no user count: the caller refers to the adapter until folding
            assert isinstance(found, FittedAdapter)
            return found
        began = self._clock.monotonic()
        path = self._file(lora)
        read = read_adapter(path, name=lora.name, max_rank=self._max_rank, with_conditioners=lora.has_conditioners)
        if lora.sha256 not in ("", read.sha256):
            message = f"adapter {lora.name!r} is another file than the request names: its hash is {read.sha256}"
            raise InvalidRequestError(message, field="loras", allowed=lora.sha256)
        fitted = self.base.fit(read)
        self._cache.put(key, fitted, name=lora.name)
        self._metrics.increment("engine_adapter_loads")
        for warning in fitted.warnings:
            log.warning(warning)
        seconds = self._clock.monotonic() - began
        log.info("loaded adapter %s (%s, rank %d) in %.2f s", lora.name, fitted.type, fitted.rank, seconds)
        return fitted

    def _file(self, lora: Lora) -> Path:
        """Return an adapter's file. Raises StorageError, because it is not the client who names the source."""
        try:
            return self._fetch(lora.source)
        except InvalidRequestError as error:
            log.warning("adapter %s cannot be loaded: %s", lora.name, error.message)
            raise StorageError(f"the file of adapter {lora.name!r} cannot be downloaded now") from error

    def _finish_device_work(self) -> None:
        """Wait for this thread's work, because the engine's thread may use the slots on another stream.

        On CUDA, waits for one stream only: while the engine's thread captures a call, a wait for the whole device would
        fail and would spoil the capture. Apple's GPUs can only be waited for as a whole.
        """
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        elif device.type != "cpu":
            torch.accelerator.synchronize(device)


def _release_result(job: Future[HeldSlots]) -> None:
    """Release the slots of a request that was cancelled while they were loaded."""
    if not job.cancelled() and job.exception() is None:
        job.result().release()


def _active(loras: Sequence[Lora], t: float) -> tuple[Lora, ...]:
    """Returns the adapters that apply at time `t` and whose strength is not 0. Times are compared in float32."""
    time = np.float32(t)
    return tuple(
        lora for lora in loras if lora.strength and np.float32(lora.interval[0]) <= time <= np.float32(lora.interval[1])
    )


def _identity(lora: Lora, find_file: Callable[[Lora], Path]) -> Hashable:
    """Returns a key of the adapter: its hash, or if the request gives no hash, the path, time and size of its file."""
    if lora.sha256:
        return lora.sha256, lora.has_conditioners
    path = find_file(lora)
    try:
        stat = path.stat()
    except OSError:
        return str(path), lora.has_conditioners
    return str(path), stat.st_ctime_ns, stat.st_size, lora.has_conditioners
