"""Prepares what a clip (row) needs before its first denoising step: noise, prompt embeddings and encoded source audio.
Clips with the same prompt share the prompt's embedding, and variations of one request share the encoded source.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import replace

from torch import Tensor

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.engine.calls.request_state import Prompts
from stable_audio_serve.engine.calls.rows import Encoding, Failures, Row, RowNoise, run_alone
from stable_audio_serve.engine.hardware.device import Device, Moment
from stable_audio_serve.engine.scheduling.pacing import CallTimes
from stable_audio_serve.engine.scheduling.windows import SourceEncoding
from stable_audio_serve.models.protocol import DiffusionModel, EncodeWindow, TextEmbedding


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
        """The size of all cached embeddings in bytes."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._embeddings)


class RowInputs:
    """Prepares rows for their first step: draws noise, and encodes prompts and source audio. Used by the engine thread
    only.

    Each public method returns the rows that failed, with their exceptions.
    """

    def __init__(
        self,
        model: DiffusionModel,
        executor: Executor,
        *,
        device: Device,
        times: CallTimes,
        cache: PromptCache,
        noise_pools: Mapping[Priority, futures.Executor],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`noise_pools` has one executor for each priority, which draws the noise and must start its tasks in order."""
        self._model = model
        self._executor = executor
        self._device = device
        self._times = times
        self._cache = cache
        self._noise_pools = noise_pools
        self._clock = clock
        self._metrics = metrics
        self._ready: Moment | None = None  # the end of all text and source encoding that is queued on the device

    def start(self, rows: Sequence[Row]) -> Failures:
        """Start drawing the rows' noise, encode their prompts, and prepare the encoding of their source audio.

        `encode` must then be called for the rows that have source audio. Returns the rows that failed.
        """
        noises: dict[int, RowNoise] = {}
        failures: Failures = []
        for row in rows:
            failures += run_alone(row, lambda row: self._open_noise(row, noises), device=self._device)
        failures += self._embed([row for row in rows if row.id in noises])
        failed = {row.id for row, _ in failures}
        for row in rows:
            prompts = row.request.shared.prompts.get(row.plan.prompt)
            if row.id in failed or prompts is None:
                if row.id in noises:
                    noises[row.id].cancel()
                continue
            assert self._ready is not None
            row.phase = encoding = Encoding(noises[row.id], prompts, self._ready)
            self._open_sources(row, encoding)
        return failures

    def encode(self, rows: Sequence[Row]) -> Failures:
        """Encode the next few windows of each row's source audio. Returns the rows that failed."""
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

    def _encode(self, windows: Sequence[EncodeWindow]) -> Sequence[Tensor | Exception]:
        if not windows:  # another row of the request has already encoded them
            return []
        calls = [((1, window.samples.shape[-1] // self._model.spec.hop),) for window in windows]
        return self._times.time("encode", calls, run=lambda: self._executor.encode(windows))

    def _embed(self, rows: Sequence[Row]) -> Failures:
        """Store the embeddings of the rows' prompts in `row.request.shared`. Prompts that are not in the cache are
        encoded together.

        Returns the rows that failed.
        """
        rows = [row for row in rows if row.plan.prompt not in row.request.shared.prompts]
        prompts = dict.fromkeys(prompt for row in rows for prompt in _prompts(row))
        known: dict[str, TextEmbedding | Exception] = {
            prompt: embedding for prompt in prompts if (embedding := self._cache.get(prompt)) is not None
        }
        missing = [prompt for prompt in prompts if prompt not in known]
        self._metrics.increment("engine_prompt_cache_hits", len(known))
        self._metrics.increment("engine_prompt_cache_misses", len(missing))
        if missing:
            with self._device.on_second_queue():
                outcomes = self._times.time("text", [((len(missing), 0),)], run=lambda: self._executor.embed(missing))
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
            for outcome in (known[prompt] for prompt in _prompts(row)):
                if isinstance(outcome, Exception):
                    failures.append((row, outcome))
                    break
                embeddings.append(outcome)
            else:
                prompt, *negative = embeddings
                row.request.shared.prompts[row.plan.prompt] = Prompts(prompt, negative[0] if negative else None)
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


def _prompts(row: Row) -> list[str]:
    """Return the row's prompt and its negative prompt, if any."""
    negative = row.plan.negative_prompt
    return [row.plan.prompt] if negative is None else [row.plan.prompt, negative]


def _lengths_left(sources: Mapping[str, SourceEncoding]) -> tuple[int, ...]:
    """Return the lengths, in latent frames, of all source windows that are not encoded yet."""
    return tuple(frames for source in sources.values() for frames in source.lengths_left)
