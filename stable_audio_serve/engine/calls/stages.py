"""Runs the phases of the rows (clips) that the scheduler picked: encoding, denoising, decoding. On CUDA, encoding and
decoding run on a second stream, in parallel with denoising. Rows with the same prompt share its embedding, and
variations of one request share the encoded source. If a row fails, its request is ended by `engine.loop`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace

import torch
from torch import Tensor

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import GenerationError, InvalidRequestError, StableAudioError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.calls.conditioning import HeldConditioning
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.engine.calls.requests import Decoding, Encoding, Failures, Prompts, Row, RowNoise, Stepping
from stable_audio_serve.engine.hardware.device import Device, Moment
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.engine.scheduling.pacing import CallTimes
from stable_audio_serve.engine.scheduling.windows import AudioAssembly, SourceEncoding
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel, EncodeWindow, TextEmbedding, WindowSpan
from stable_audio_serve.models.windows import cut_windows
from stable_audio_serve.sampling.plan import LATENTS
from stable_audio_serve.sampling.update import Kept, StepNumbers, start_state


class PromptCache:
    """An LRU cache of text embeddings. Not thread-safe.

    All embeddings together take at most `max_bytes`. 0 turns the cache off.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._embeddings: OrderedDict[str, TextEmbedding] = OrderedDict()

    def get(self, prompt: str) -> TextEmbedding | None:
        """Return the cached embedding of exactly this prompt text; None if it is not in the cache."""
        embedding = self._embeddings.get(prompt)
        if embedding is not None:
            self._embeddings.move_to_end(prompt)
        return embedding

    def put(self, embedding: TextEmbedding) -> None:
        """Add an embedding, and drop the least recently used ones if the cache is too large.

        An embedding larger than `max_bytes` is not added.
        """
        if embedding.num_bytes > self._max_bytes or embedding.prompt in self._embeddings:
            return
        self._embeddings[embedding.prompt] = embedding
        self._num_bytes += embedding.num_bytes
        while self._num_bytes > self._max_bytes:
            _, dropped = self._embeddings.popitem(last=False)
            self._num_bytes -= dropped.num_bytes

    @property
    def num_bytes(self) -> int:
        return self._num_bytes


class Stages:
    """Runs the phases of rows, with one method per phase. Used by the engine thread only.

    Each of these methods returns the rows that failed, with their exceptions. `times` measures the calls of `executor`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        executor: Executor,
        *,
        device: Device,
        cost: CostModel,
        prompt_cache_bytes: int,
        noise_pools: Mapping[Priority, futures.Executor],
        is_fixed: bool,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`noise_pools` has one executor for each priority, which draws the noise and must start its tasks in order.

        With `is_fixed`, the audio is decoded in exactly the planned windows.
        """
        self._model = model
        self.executor = executor
        self._device = device
        self.times = CallTimes(device, cost=cost, metrics=metrics)
        self._is_fixed = is_fixed
        self._clock = clock
        self._metrics = metrics
        self._cache = PromptCache(prompt_cache_bytes)
        self._noise_pools = noise_pools
        self._ready: Moment | None = None  # the end of all text and source encoding that is queued on the device
        self._delivering: deque[tuple[Row, Moment]] = deque()

    def start(self, rows: Sequence[Row]) -> Failures:
        """Start drawing the rows' noise, encode their prompts, and prepare the encoding of their source audio.

        Call `encode` next for rows with source audio, and `begin` for the others. Returns the rows that failed.
        """
        noises: dict[int, RowNoise] = {}
        failures: Failures = []
        for row in rows:
            failures += self._alone(row, lambda row: self._open_noise(row, noises))
        failures += self._embed([row for row in rows if row.id in noises])
        failed = {row.id for row, _ in failures}
        for row in rows:
            if row.id in failed:
                if row.id in noises:
                    noises[row.id].cancel()
                continue
            assert self._ready is not None
            row.phase = encoding = Encoding(noises[row.id], self._ready)
            self._open_sources(row, encoding)
        return failures

    def encode(self, rows: Sequence[Row]) -> Failures:
        """Encode the next few windows of each row's source audio. Returns the rows that failed.

        Call `begin` for a row whose last window was encoded.
        """
        sources = {row.id: row.in_phase(Encoding).sources for row in rows}
        pending = {id(source): source for own in sources.values() for source in own.values() if source.lengths_left}
        failed: dict[int, Exception] = {}
        windows = [(source, window) for source in pending.values() for window in source.pending()]
        with self._device.on_second_queue():
            for (source, _), outcome in zip(windows, self._encode([window for _, window in windows]), strict=True):
                if isinstance(outcome, Exception):
                    failed[id(source)] = outcome
                elif id(source) not in failed:
                    source.put(outcome)
            self._ready = ready = self._device.mark()
        failures: Failures = []
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("source", now)
            row.phase = replace(row.in_phase(Encoding), ready=ready)
            own = sources[row.id]
            row.work.encode_left = _lengths_left(own)
            errors = [failed[id(source)] for source in own.values() if id(source) in failed]
            if errors:
                failures.append((row, errors[0]))
        return failures

    def begin(self, rows: Sequence[Row], *, at_once: bool = True) -> Failures:
        """Compute the conditioning and the initial latents of rows whose encoding has been queued on the device.

        With `at_once` False, rows are skipped while the device is still encoding their prompts or sources. Returns the
        rows that failed.
        """
        failures: Failures = []
        for row in rows:
            ready = row.in_phase(Encoding).ready
            if at_once or ready.is_reached():
                self._device.follow(ready)
                failures += self._alone(row, self._set_registers)
        return failures

    def denoise(self, rows: Sequence[Row]) -> Failures:
        """Run one evaluation of every row. Returns the rows that failed.

        A row that has run its last evaluation moves to the phase Decoding.
        """
        failures = self._follow_intervals(rows)
        if failures:
            rows = [row for row in rows if all(row is not failed for failed, _ in failures)]
        if not rows:
            return failures
        calls = self.executor.calls(rows)
        lanes = [row.work.lane for row in rows]
        tokens = sum(lane.branches * lane.frames for lane in lanes)
        groups = [call.groups for call in calls]
        is_adapted = any(row.slot is not None for row in rows)
        failures += self.times.time(
            "denoise", groups, run=lambda: self.executor.denoise(rows, calls), is_adapted=is_adapted
        )
        failpoint("between_steps")
        self._metrics.observe("engine_rows_per_step", len(rows))
        padded_tokens = sum(count * frames for own in groups for count, frames in own)
        self._metrics.gauge("engine_pad_share", 1.0 - tokens / padded_tokens)
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("denoise", now)
            if row.work.num_done == len(row.work.branches):
                failures += self._alone(row, self._take_latents)
        return failures

    def decode(self, rows: Sequence[Row]) -> Failures:
        """Decode the next few windows of each row. Returns the rows that failed."""
        failpoint("before_decode")
        decoding = {row.id: row.in_phase(Decoding) for row in rows}
        failed: dict[int, tuple[Row, Exception]] = {}
        with self._device.on_second_queue(*(own.latents for own in decoding.values())):
            windows: list[tuple[Row, DecodeWindow]] = []

            def cut(row: Row) -> None:
                own = decoding[row.id]
                windows.extend((row, window) for window in own.audio.pending(own.latents, own.noise))

            for row in rows:
                failed.update({one.id: (one, error) for one, error in self._alone(row, cut)})
            calls = [((1, window.latents.shape[-1]),) for _, window in windows]
            outcomes = self.times.time(
                "decode", calls, run=lambda: self.executor.decode([window for _, window in windows])
            )
            for (row, _), outcome in zip(windows, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failed.setdefault(row.id, (row, outcome))
                elif row.id not in failed:
                    audio = decoding[row.id].audio
                    audio.put(outcome)
                    row.work.decode_left = audio.lengths_left
            ready = self._device.mark()
        self._metrics.gauge("engine_device_memory_bytes", self._device.use().memory_used_bytes or 0)
        now = self._clock.monotonic()
        for row in rows:
            row.phase = replace(decoding[row.id], ready=ready)
            row.request.clock.mark("decode", now)
        return list(failed.values())

    def deliver(self, row: Row) -> None:
        """Register a row whose last window is queued for decoding. `delivered` returns the row once its audio is on the
        host.
        """
        self._delivering.append((row, row.in_phase(Decoding).ready))

    def delivered(self, *, wait: bool = False) -> tuple[list[Row], Failures]:
        """Return the registered rows whose audio has arrived on the host. Rows with non-finite audio are also returned
        as failures.

        With `wait`, block until the audio of at least one registered row has arrived.
        """
        self._device.collect()  # copies what has arrived so far, so that little is left to copy when the row is done
        arrived: list[Row] = []
        failures: Failures = []
        while self._delivering:
            row, moment = self._delivering[0]
            if not moment.is_reached():
                if not wait or arrived:
                    break
                moment.wait()
            self._device.collect()
            self._delivering.popleft()
            if not isinstance(row.phase, Decoding):
                continue  # the row ended before its audio arrived
            row.request.clock.mark("decode", self._clock.monotonic())  # the wait for the device counts as decoding
            arrived.append(row)
            if not row.phase.audio.is_finite:
                failures.append((row, _not_a_number(row)))
        return arrived, failures

    def require_usable(self, error: Exception) -> None:
        """Raise DeviceLostError if `error` is one, or if it has made the device unusable."""
        self._device.require_usable(error)

    def _alone(self, row: Row, action: Callable[[Row], None]) -> Failures:
        """Call `action(row)`. Returns an empty list, or the row with the exception if `action` raises.

        Raises DeviceLostError if the device is lost.
        """
        try:
            action(row)
        except Exception as error:  # noqa: BLE001 - the engine's edge
            self._device.require_usable(error)
            return [(row, error)]
        return []

    def _encode(self, windows: Sequence[EncodeWindow]) -> Sequence[Tensor | Exception]:
        if not windows:  # another row of the request has already encoded them
            return []
        calls = [((1, window.samples.shape[-1] // self._model.spec.hop),) for window in windows]
        return self.times.time("encode", calls, run=lambda: self.executor.encode(windows))

    def _embed(self, rows: Sequence[Row]) -> Failures:
        """Store the embeddings of the rows' prompts in `row.request.shared`. Prompts that are not in the cache are
        encoded together.

        Returns the rows that failed.
        """
        rows = [row for row in rows if row.plan.prompt not in row.request.shared.prompts]
        prompts = dict.fromkeys(prompt for row in rows for prompt in _prompts(row).values())
        known: dict[str, TextEmbedding | Exception] = {
            prompt: embedding for prompt in prompts if (embedding := self._cache.get(prompt)) is not None
        }
        missing = [prompt for prompt in prompts if prompt not in known]
        self._metrics.increment("engine_prompt_cache_hits", len(known))
        self._metrics.increment("engine_prompt_cache_misses", len(missing))
        if missing:
            with self._device.on_second_queue():
                outcomes = self.times.time("text", [((len(missing), 0),)], run=lambda: self.executor.embed(missing))
                self._ready = self._device.mark()
            known.update(zip(missing, outcomes, strict=True))
            for outcome in outcomes:
                if not isinstance(outcome, Exception):
                    self._cache.put(outcome)
        failures: Failures = []
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("text", now)
            embeddings: list[TextEmbedding] = []
            for field, prompt in _prompts(row).items():
                outcome = known[prompt]
                if isinstance(outcome, InvalidRequestError):  # the model does not know which field the text is from
                    outcome = InvalidRequestError(outcome.message, field=field)
                if isinstance(outcome, Exception):
                    failures.append((row, outcome))
                    break
                embeddings.append(outcome)
            else:
                own, *negative = embeddings
                row.request.shared.prompts[row.plan.prompt] = Prompts(own, negative[0] if negative else None)
        return failures

    def _open_noise(self, row: Row, noises: dict[int, RowNoise]) -> None:
        shape = (self._model.spec.card.latent_channels, row.plan.frames)
        source = row.request.noise_factory(row.plan.seed)
        noise_pool = self._noise_pools[row.request.request.priority]
        noises[row.id] = RowNoise(source, row.plan.sampler, shape=shape, noise_pool=noise_pool)

    def _open_sources(self, row: Row, encoding: Encoding) -> None:
        """Set `encoding.sources` to a SourceEncoding for each source of the row.

        Rows of the same request share these encodings, unless the encoder draws noise.
        """
        shared = {} if self._model.spec.noisy_source_encoder else row.request.shared.sources
        for stage, plan in (("init", row.plan.init_source), ("inpaint", row.plan.inpaint_source)):
            if plan is not None:
                if stage not in shared:
                    noise, hop = encoding.noise.source, self._model.spec.hop
                    shared[stage] = SourceEncoding(plan, stage=stage, noise=noise, hop=hop)
                encoding.sources[stage] = shared[stage]
        row.work.encode_left = _lengths_left(encoding.sources)

    def _set_registers(self, row: Row) -> None:
        encoding, plan = row.in_phase(Encoding), row.plan.sampler
        init, inpaint = encoding.sources.get("init"), encoding.sources.get("inpaint")
        kept = None
        if plan.start_blend is not None:
            if row.plan.keep_mask is None or inpaint is None:
                raise RuntimeError("a blended plan keeps nothing")
            mask, noise = self._device.upload(row.plan.keep_mask == 1.0), self._device.upload(encoding.noise.kept())
            kept = Kept(mask=mask, source=inpaint.latents().float(), noise=noise)
        noise = self._device.upload(encoding.noise.initial())
        registers = start_state(plan, noise, source=init.latents() if init else None, kept=kept)
        numbers = [StepNumbers.of(evaluation) for evaluation in plan.evaluations]
        parts = [registers]
        if kept is not None:
            parts.append(torch.stack([kept.mask.float().expand_as(kept.source), kept.source, kept.noise]))
        held = self.executor.hold(torch.cat(parts) if kept is not None else registers)
        latents = None if plan.start_blend or inpaint is None else inpaint.latents()
        try:
            conditioning = self._condition(row, latents)
        except Exception:
            held.free()  # `row.release` would not free this memory, because `row.phase` does not contain it yet
            raise
        kept_latents = None if row.request.slots.is_constant else latents
        row.phase = Stepping(encoding.noise, conditioning, numbers, held, slot=row.slot, inpaint=kept_latents)

    def _follow_intervals(self, rows: Sequence[Row]) -> Failures:
        """Compute a row's conditioning again, unless it was computed with the adapters of the row's next evaluation.

        Returns the rows that failed.
        """
        failures: Failures = []
        for row in rows:
            if row.slot is not row.in_phase(Stepping).slot:
                failures += self._alone(row, self._condition_again)
        return failures

    def _condition_again(self, row: Row) -> None:
        stepping = row.in_phase(Stepping)
        conditioning = self.executor.condition(row, stepping.inpaint)
        stepping.conditioning.free()  # first, because memory of a fixed size has no room for both
        held = self.executor.conditioning.hold(conditioning)
        row.phase = replace(stepping, conditioning=held, slot=row.slot)

    def _condition(self, row: Row, inpaint: Tensor | None) -> HeldConditioning:
        """Return the row's conditioning, which rows with the same prompt share where possible.

        `inpaint` has the latents (channels, frames) of the source audio that the row edits. It is None if the network
        does not read them.
        """
        shared, is_shared = row.request.shared, row.request.slots.is_constant
        earlier = shared.conditioning.get(row.plan.prompt) if is_shared else None
        if earlier is not None and not earlier.is_freed:
            return earlier.share()
        held = self.executor.conditioning.hold(self.executor.condition(row, inpaint))
        if is_shared and (inpaint is None or not self._model.spec.noisy_source_encoder):
            # Memory of a fixed size is planned for rows in progress. It has no space for the conditioning of a request
            # that has no row in progress.
            shared.keeps_conditioning = self.executor.conditioning.fixed is None
            shared.conditioning[row.plan.prompt] = held.share() if shared.keeps_conditioning else held
        return held

    def _take_latents(self, row: Row) -> None:
        """Move a denoised row to the phase Decoding: copy its latents and free the memory of its registers."""
        stepping, plan, spec = row.in_phase(Stepping), row.plan, self._model.spec
        spans: Sequence[WindowSpan] = plan.decode_windows
        if plan.decode_rule is not None and not self._is_fixed:
            spans = cut_windows(spans[-1].stop, rule=plan.decode_rule)  # as few windows as possible
        audio = AudioAssembly(
            spans,
            device=self._device,
            channels=spec.card.channels,
            hop=spec.hop,
            valid_frames=plan.valid_frames,
            output_samples=plan.output_samples,
        )
        latents = self.executor.release(stepping.held, part=LATENTS)
        # From here on, the row has no memory of the phase Stepping, which an error would free again.
        row.phase = Decoding(stepping.noise.source, latents, audio, self._device.mark())
        stepping.conditioning.free()
        audio.check(latents[:, : plan.valid_frames])
        row.work.decode_left = audio.lengths_left


def _not_a_number(row: Row) -> StableAudioError:
    """Return the error of a row whose audio is not finite: a client error if the request has adapters."""
    if names := "+".join(lora.name for lora in row.request.request.loras):
        return InvalidRequestError(f"adapter {names!r} makes audio that is not a number", field="loras")
    return GenerationError("the model made audio that is not a number")


def _prompts(row: Row) -> dict[str, str]:
    """Return the row's prompt and its negative prompt, if any, by the names of their fields in the request."""
    field, negative = "prompts" if row.request.request.variation_prompts else "prompt", row.plan.negative_prompt
    return {field: row.plan.prompt} if negative is None else {field: row.plan.prompt, "negative_prompt": negative}


def _lengths_left(sources: Mapping[str, SourceEncoding]) -> tuple[int, ...]:
    """Return the lengths, in latent frames, of all source windows that are not encoded yet."""
    return tuple(frames for source in sources.values() for frames in source.lengths_left)
