"""The loop of the engine thread, which is the only thread that uses the device. Each turn of the loop receives new
requests, ends cancelled and expired ones, picks rows (clips) to work on, runs one phase of each picked row (encoding, a
denoising step, or decoding) and returns finished audio. When the thread ends, all unfinished requests fail.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count

import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import (
    CancelledRequestError,
    GenerationError,
    InvalidRequestError,
    StableAudioError,
    StartTimeoutError,
    engine_stopped,
)
from stable_audio_serve.core.generation import GenerationResult, Progress
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.calls.requests import (
    Decoding,
    Encoding,
    Failures,
    RequestState,
    Row,
    Stepping,
    Waiting,
    deadline_error,
)
from stable_audio_serve.engine.calls.stages import Stages
from stable_audio_serve.engine.scheduling.memory import RowMemory
from stable_audio_serve.engine.scheduling.prediction import Predictor
from stable_audio_serve.engine.scheduling.scheduler import Phase, RowId, Scheduler
from stable_audio_serve.models.protocol import ModelSpec

log = logging.getLogger(__name__)

_LONG_TURN_S = 0.2  # longer than any turn without work, whose time must not count as busy
_IDLE_BEAT_S = 0.5


class Inbox:
    """A queue that passes submitted requests from callers to the engine thread.

    When the engine thread stops reading, it closes the inbox. A closed inbox accepts no more requests.
    """

    def __init__(self) -> None:
        self._requests: deque[RequestState] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = False

    def put(self, request: RequestState) -> None:
        """Add a request. Raises ModelUnavailableError if the inbox is closed."""
        with self._lock:
            if self._closed:
                raise engine_stopped()
            self._requests.append(request)
        self._changed.set()

    def wake(self) -> None:
        """Make `wait` return at once. Called after a cancellation, and to stop the engine thread."""
        self._changed.set()

    def wait(self, timeout_s: float) -> None:
        """Block until a request arrives or `wake` is called, at most `timeout_s`."""
        self._changed.wait(timeout_s)

    def take(self) -> list[RequestState]:
        """Remove and return all requests in the queue."""
        self._changed.clear()
        with self._lock:
            taken = list(self._requests)
            self._requests.clear()
        return taken

    def close(self) -> list[RequestState]:
        """Accept no more requests. Returns the requests that are still in the queue."""
        with self._lock:
            self._closed = True
        return self.take()


class EngineLoop:
    """Holds all requests and their rows from arrival to end, and runs their phases. Used by the engine thread only."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        scheduler: Scheduler,
        stages: Stages,
        predictor: Predictor,
        memory: RowMemory,
        admission: Admission,
        inbox: Inbox,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._stages = stages
        self._predictor = predictor
        self._memory = memory
        self._admission = admission
        self._inbox = inbox
        self._clock = clock
        self._metrics = metrics
        self._rows: dict[RowId, Row] = {}
        self._requests: dict[int, RequestState] = {}
        self._row_ids = count()
        self._queue_changed = False

    def turn(self) -> bool:
        """Run one turn of the loop. Returns False if there was nothing to do."""
        for request in self._inbox.take():
            self._receive(request)
        self._end_cancelled_and_late()
        self._report_positions()
        ids = self._scheduler.pick(use_second_queue=self._stages.times.second_queue_has_room) or self._scheduler.pick()
        picked = [self._rows[row_id] for row_id in ids]
        try:
            if not picked:
                return self._deliver(wait=True) or self._stages.executor.graphs.capture_next(is_idle=True)
            self._work(picked)
            self._deliver()
        except Exception as error:
            self._stages.require_usable(error)
            log.exception("a turn of the engine failed")
            self._fail([(row, error) for row in picked or self._rows.values()])
        self._report(picked)
        return True

    def abort(self) -> None:
        """Fail all unfinished requests, and close the inbox so that no more are accepted."""
        for request in self._inbox.close():
            self._requests[request.id] = request
        for request in list(self._requests.values()):
            self._end(request, outcome="unavailable")
            request.reply.fail(engine_stopped())

    def _receive(self, request: RequestState) -> None:
        self._requests[request.id] = request
        try:
            for plan, _ in request.plans:
                self._memory.check(plan, request.request)
        except InvalidRequestError as error:
            self._end(request, outcome="failed")
            request.reply.fail(error)
            return
        alone_s = sum(self._predictor.alone_ms(work) for _, work in request.plans) / 1000.0
        for index, (plan, work) in enumerate(request.plans):
            row = Row(RowId(next(self._row_ids)), request, index=index, plan=plan, work=work)
            request.rows.append(row)
            self._rows[row.id] = row
            self._scheduler.add(
                row.id,
                work,
                arrived_at=request.submitted_at,
                alone_s=alone_s,
                priority=request.request.priority,
                num_bytes=self._memory.row_bytes(plan),
            )
        self._queue_changed = True

    def _end_cancelled_and_late(self) -> None:
        now = self._clock.monotonic()
        for request in [each for each in self._requests.values() if now >= each.end_at or each.is_abandoned]:
            self._end(request, outcome="cancelled" if request.is_abandoned else "expired")
            if request.is_abandoned:
                request.reply.fail(CancelledRequestError("the request was cancelled"))
            elif now >= request.deadline_at:
                request.reply.fail(deadline_error(request.request))
            else:
                limit_s = request.request.start_within_s
                request.reply.fail(StartTimeoutError(f"the request did not start within its {limit_s:g} s"))

    def _work(self, picked: Sequence[Row]) -> None:
        """Run one phase of every picked row."""
        now = self._clock.monotonic()
        for row in picked:
            row.request.clock.mark("denoise" if row.request.is_started else "queue", now)
        for row in picked:
            row.request.start()
        phases = {row.id: row.work.phase for row in picked}
        new = [row for row in picked if isinstance(row.phase, Waiting)]
        stepping = [row for row in picked if phases[row.id] is Phase.DENOISE]
        self._begin([row for row in stepping if isinstance(row.phase, Encoding)])
        self._fail(self._stages.start(new))
        # Encoding and decoding can run in parallel with the denoising step only if they are queued before it.
        for phase, run in ((Phase.ENCODE, self._stages.encode), (Phase.DECODE, self._stages.decode)):
            rows = [row for row in picked if phases[row.id] is phase and row.id in self._rows]
            if rows:
                self._fail(run(rows))
        self._unschedule_finished(picked)
        self._deliver()  # before the step, so that audio that is already on the host does not wait for it
        self._begin(stepping, at_once=not any(isinstance(row.phase, Stepping) for row in stepping))
        rows = [row for row in stepping if isinstance(row.phase, Stepping)]
        if rows:
            self._fail(self._stages.denoise(rows))
        self._unschedule_finished(rows)
        self._stages.times.keep_pace()
        self._stages.executor.graphs.capture_next(is_idle=False)

    def _unschedule_finished(self, rows: Sequence[Row]) -> None:
        """Remove each row from the scheduler once all its remaining work is queued on the device."""
        for row in rows:
            if row.id in self._scheduler and row.work.phase is Phase.DONE:
                self._scheduler.remove(row.id)
                self._stages.deliver(row)

    def _begin(self, rows: Sequence[Row], *, at_once: bool = True) -> None:
        """Prepare rows in the phase Encoding for their first denoising step.

        With `at_once` False, rows whose prompts or sources the device is still encoding are left for a later turn, so
        that the denoising step of the other rows does not wait for them.
        """
        waiting = [row for row in rows if isinstance(row.phase, Encoding)]
        if waiting:
            self._fail(self._stages.begin(waiting, at_once=at_once))

    def _deliver(self, *, wait: bool = False) -> bool:
        """Finish the rows whose audio has arrived on the host. Returns whether there were any.

        With `wait`, wait until the audio of at least one row arrives, if any row's audio is on its way to the host.
        """
        arrived, failures = self._stages.delivered(wait=wait)
        self._fail(failures)
        for row in arrived:
            if row.id not in self._rows:
                continue
            try:
                self._finish(row)
            except Exception as error:  # noqa: BLE001 - an error in one row's audio must not end the thread
                self._fail([(row, error)])
        return bool(arrived)

    def _finish(self, row: Row) -> None:
        """Store a row's finished audio. After the last row of the request, send the result to the caller."""
        request = row.request
        request.audio[row.index] = row.in_phase(Decoding).audio.audio()
        self._drop(row)
        if len(request.audio) < len(request.rows):
            return
        timings = request.clock.timings()
        result = GenerationResult(
            audio=tuple(request.audio[index] for index in range(len(request.rows))),
            sample_rate_hz=self._spec.card.sample_rate_hz,
            model=self._spec.card.name,
            seeds=tuple(row.plan.seed for row in request.rows),
            timings=timings,
        )
        steps = request.progress(None).steps_total
        self._end(request, outcome="finished")
        request.reply.report(Progress("done", 1.0, steps, steps))
        request.reply.resolve(result)
        self._metrics.observe("engine_queue_ms", timings.queue_ms)
        self._metrics.observe("engine_request_ms", timings.total_ms)
        samples = sum(audio.shape[-1] for audio in result.audio)
        self._metrics.increment("engine_audio_seconds", samples / self._spec.card.sample_rate_hz)

    def _fail(self, failures: Failures) -> None:
        """End the request of each failed row with the row's error. Other requests are not affected."""
        for row, error in failures:
            request = row.request
            if request.id not in self._requests:
                continue
            name = request.request.request_id or request.id
            if isinstance(error, InvalidRequestError):
                log.info("request %s refused: %s", name, error)
            else:
                log.error("request %s failed: %r", name, error, exc_info=error)
            self._end(request, outcome="failed")
            if not isinstance(error, StableAudioError):
                error = GenerationError("the model failed on this request")
            request.reply.fail(error)

    def _end(self, request: RequestState, *, outcome: str) -> None:
        """Remove a request and all its rows. Every request ends with a call of this method."""
        del self._requests[request.id]
        for row in request.rows:
            if row.id in self._rows:
                self._drop(self._rows[row.id])
        # Rows and their request refer to each other. Without this, Python would keep the audio until its next
        # collection of cycles, which may be a hundred requests later.
        request.rows.clear()
        request.shared.release()
        request.slots.release()
        self._admission.release(request.id, is_done=outcome == "finished")
        self._metrics.increment("engine_requests", outcome=outcome)
        self._queue_changed = True

    def _drop(self, row: Row) -> None:
        del self._rows[row.id]
        if row.id in self._scheduler:  # not if all of the row's work was queued; see `_unschedule_finished`
            self._scheduler.remove(row.id)
        row.release()

    def _report(self, picked: Sequence[Row]) -> None:
        """Update the remaining work of the picked rows in `Admission`, and send progress to callers that want it."""
        for request in {row.request.id: row.request for row in picked}.values():
            if request.id in self._requests:
                left_ms = sum(self._predictor.share_ms(row.work) for row in request.rows if row.id in self._rows)
                self._admission.update(request.id, left_ms)
                if request.reply.wants_progress:
                    request.reply.report(request.progress(None))
        self._metrics.gauge("engine_backlog_ms", self._admission.backlog_ms)

    def _report_positions(self) -> None:
        """Send the queue position of each request that has not started to its caller, if the position has changed."""
        if not self._queue_changed:
            return
        self._queue_changed = False
        for request in self._requests.values():
            if request.is_started or not request.reply.wants_progress:
                continue
            position = min(self._scheduler.position(row.id) for row in request.rows)
            if position != request.last_position:
                request.last_position = position
                request.reply.report(request.progress(position))


class EngineThread:
    """The engine thread. It runs `prepare` and then the turns of `loop`. Once it has ended, it is never restarted."""

    def __init__(
        self,
        loop: EngineLoop,
        inbox: Inbox,
        *,
        sharing: AbstractContextManager[object],
        prepare: Callable[[], None],
        clock: Clock,
    ) -> None:
        """The thread does all its work within the context manager `sharing`, which sets how many CPU threads an
        operation uses.
        """
        self._loop = loop
        self._inbox = inbox
        self._sharing = sharing
        self._prepare = prepare
        self._clock = clock
        self._beat_at = clock.monotonic()
        # Seconds spent in ended turns that did work, and when the current turn began. One value, because other threads
        # read it.
        self._busy: tuple[float, float | None] = 0.0, None
        self._stopping = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.error: BaseException | None = None  # the error that ended the thread, if any

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until `prepare` has succeeded or the thread has ended."""
        self._ready.wait()

    def stop(self, *, timeout_s: float) -> None:
        """End the thread after its current turn and wait for it, at most `timeout_s` seconds.

        Unfinished requests fail with ModelUnavailableError.
        """
        self._stopping = True
        self._inbox.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    @property
    def busy_s(self) -> float:
        """For how many seconds the thread has worked. A turn of more than `_LONG_TURN_S` counts while it runs, because
        a step of a large model on a CPU takes seconds.
        """
        ended_s, began_at = self._busy
        turn_s = 0.0 if began_at is None else self._clock.monotonic() - began_at
        return ended_s + (turn_s if turn_s > _LONG_TURN_S else 0.0)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def silence_s(self) -> float:
        """How many seconds ago the last turn began."""
        return self._clock.monotonic() - self._beat_at

    def _run(self) -> None:
        try:
            with torch.inference_mode(), self._sharing:
                self._prepare()
                self._ready.set()
                while not self._stopping:
                    self._beat_at = self._clock.monotonic()
                    busy_s, _ = self._busy
                    self._busy = busy_s, self._beat_at
                    if self._loop.turn():
                        self._busy = busy_s + self._clock.monotonic() - self._beat_at, None
                    else:
                        self._busy = busy_s, None
                        self._inbox.wait(_IDLE_BEAT_S)
        except BaseException as error:
            log.critical("the engine thread ended", exc_info=error)
            self.error = error
        finally:
            self._loop.abort()
            self._ready.set()
