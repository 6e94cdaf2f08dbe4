"""The phases of picked rows: encode text and sources, evaluate, decode audio. Times every device call for the cost
model and the requests' clocks. Knows no scheduler; returns failed rows to the loop, which ends their requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import TypeVar

import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.cost import CostModel, Work
from stable_audio_serve.engine.executor import DEVICE_LOST, Executor
from stable_audio_serve.engine.noise_ahead import RowNoise
from stable_audio_serve.engine.pace import WindowPace
from stable_audio_serve.engine.prompt_cache import PromptCache
from stable_audio_serve.engine.rows import Row, make_assembly
from stable_audio_serve.engine.windows import SourceEncoding
from stable_audio_serve.models.protocol import DiffusionModel, TextEmbedding
from stable_audio_serve.sampling.update import Kept, start_state

Result = TypeVar("Result")
Failures = list[tuple[Row, Exception]]


class Stages:
    """Advances rows phase by phase. Used by the engine thread only; every phase returns the rows that failed."""

    def __init__(
        self,
        model: DiffusionModel,
        executor: Executor,
        *,
        cost: CostModel,
        cache: PromptCache,
        drawers: Mapping[Priority, futures.Executor],
        pace: WindowPace,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """Each of `drawers` runs one draw at a time, in order."""
        self._model = model
        self._executor = executor
        self._cost = cost
        self._cache = cache
        self._drawers = drawers
        self._pace = pace
        self._clock = clock
        self._metrics = metrics

    def start(self, rows: Sequence[Row]) -> Failures:
        """Start rows: noise, prompts, sources. Rows without sources can step afterwards."""
        failures = [failure for row in rows for failure in _alone(row, self._open_noise)]
        failures += self._embed([row for row in rows if row.noise is not None])
        failed = {row.id for row, _ in failures}
        for row in rows:
            if row.id not in failed:
                self._open_sources(row)
                if not row.sources:
                    failures += self._begin(row)
        return failures

    def encode(self, rows: Sequence[Row]) -> Failures:
        """Encode the next source windows of each row; a row can step after its last window."""
        pending = {id(source): (source, row) for row in rows for source in row.sources.values() if source.lengths_left}
        failed: dict[int, Exception] = {}
        windows = [
            (source, window) for source, _ in pending.values() for window in source.pending(self._pace.turn_frames)
        ]
        if windows:
            shapes = [(1, window.samples.shape[-1] // self._model.spec.hop) for _, window in windows]
            outcomes = self._timed(
                "encode", shapes, run=lambda: self._executor.encode([window for _, window in windows])
            )
            for (source, _), outcome in zip(windows, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failed[id(source)] = outcome
                elif id(source) not in failed:
                    source.put(outcome)
        failures: Failures = []
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("source", now)
            row.work.encode_left = _lengths_left(row)
            errors = [failed[id(source)] for source in row.sources.values() if id(source) in failed]
            if errors:
                failures.append((row, errors[0]))
            elif not row.work.encode_left:
                failures += self._begin(row)
        return failures

    def denoise(self, rows: Sequence[Row]) -> Failures:
        """Run one evaluation of every row; after a row's last evaluation, check its latents."""
        calls = self._executor.calls(rows)
        lanes = [row.lane for row in rows]
        tokens = sum(lane.branches * lane.frames for lane in lanes)
        shapes = [call.shape for call in calls]
        failures = self._timed("denoise", shapes, run=lambda: self._executor.denoise(rows, calls))
        failpoint("between_steps")
        self._metrics.observe("engine_rows_per_step", len(rows))
        self._metrics.observe("engine_tokens_per_step", tokens)
        self._metrics.gauge("engine_pad_share", 1.0 - tokens / sum(count * frames for count, frames in shapes))
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("denoise", now)
            if row.work.num_done == len(row.work.branches):
                failures += self._take_latents(row)
        return failures

    def decode(self, rows: Sequence[Row], *, others_wait: bool = False) -> Failures:
        """Decode the next windows of each row into its audio; short ones if other rows wait for it."""
        failpoint("before_decode")
        max_frames = self._pace.decode_frames(len(rows), others_wait=others_wait)
        windows = [
            (row, window)
            for row in rows
            if row.audio is not None and row.latents is not None and row.noise is not None
            for window in row.audio.pending(row.latents, row.noise.source, max_frames=max_frames)
        ]
        shapes = [(1, window.latents.shape[-1]) for _, window in windows]
        outcomes = self._timed("decode", shapes, run=lambda: self._executor.decode([window for _, window in windows]))
        failed: dict[int, tuple[Row, Exception]] = {}
        for (row, _), outcome in zip(windows, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failed.setdefault(row.id, (row, outcome))
            elif row.id not in failed and row.audio is not None:
                row.audio.put(outcome)
                row.work.decode_left = row.audio.lengths_left
                if not row.audio.is_finite:
                    failed[row.id] = (row, GenerationError("the model made audio that is not a number"))
        self._metrics.gauge("engine_device_memory_bytes", self._executor.memory_bytes)
        now = self._clock.monotonic()
        for row in rows:
            row.request.clock.mark("decode", now)
        return list(failed.values())

    def _embed(self, rows: Sequence[Row]) -> Failures:
        """Set the rows' prompt embeddings: cached ones, and all new ones of this turn encoded together."""
        rows = [row for row in rows if row.request.prompt is None]
        prompts = dict.fromkeys(prompt for row in rows for prompt in _prompts(row))
        known: dict[str, TextEmbedding | Exception] = {
            prompt: embedding for prompt in prompts if (embedding := self._cache.get(prompt)) is not None
        }
        missing = [prompt for prompt in prompts if prompt not in known]
        self._metrics.increment("engine_prompt_cache_hits", len(known))
        self._metrics.increment("engine_prompt_cache_misses", len(missing))
        if missing:
            outcomes = self._timed("text", [(len(missing), 0)], run=lambda: self._executor.embed(missing))
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
                row.request.prompt, *negative = embeddings
                row.request.negative = negative[0] if negative else None
        return failures

    def _open_noise(self, row: Row) -> None:
        shape = (self._model.spec.card.latent_channels, row.plan.frames)
        source = row.request.noise_factory(row.plan.seed)
        drawer = self._drawers[row.request.request.priority]
        row.noise = RowNoise(source, row.plan.sampler, shape=shape, drawer=drawer)

    def _open_sources(self, row: Row) -> None:
        """Set up the encodings of a row's sources; the request's rows share them unless the encoder draws noise."""
        for stage, plan in (("init", row.plan.init_source), ("inpaint", row.plan.inpaint_source)):
            if plan is None or row.noise is None:
                continue
            encoding = row.request.sources.get(stage)
            if encoding is None:
                encoding = SourceEncoding(plan, stage=stage, noise=row.noise.source, hop=self._model.spec.hop)
                if not self._model.spec.noisy_source_encoder:
                    row.request.sources[stage] = encoding
            row.sources[stage] = encoding
        row.work.encode_left = _lengths_left(row)

    def _begin(self, row: Row) -> Failures:
        """Set a row's conditioning and registers, after which it can step."""
        return _alone(row, self._condition, self._set_registers)

    def _condition(self, row: Row) -> None:
        request = row.request
        if request.prompt is None:
            raise RuntimeError("a row was conditioned before its prompt was encoded")
        if request.conditioning is not None:
            row.conditioning = request.conditioning
            return
        inpaint = None if row.plan.sampler.start_blend else row.sources.get("inpaint")
        row.conditioning = self._model.condition(
            row.plan,
            prompt=request.prompt,
            negative=request.negative,
            inpaint_latents=inpaint.latents() if inpaint else None,
        )
        if inpaint is None or not self._model.spec.noisy_source_encoder:
            request.conditioning = row.conditioning

    def _set_registers(self, row: Row) -> None:
        if row.noise is None:
            raise RuntimeError("a row began before its noise was drawn")
        init = row.sources.get("init")
        noise = row.noise.initial().to(self._model.device)
        row.kept = self._keep(row, row.noise)
        row.state = start_state(row.plan.sampler, noise, source=init.latents() if init else None, kept=row.kept)
        row.sources = {}

    def _keep(self, row: Row, noise: RowNoise) -> Kept | None:
        """Returns what a row with a blended plan keeps, on the model's device."""
        if row.plan.sampler.start_blend is None:
            return None
        if row.plan.keep_mask is None:
            raise RuntimeError("a blended plan has no mask")
        return Kept(
            mask=(row.plan.keep_mask == 1.0).to(self._model.device),
            source=row.sources["inpaint"].latents().float(),
            noise=noise.kept().to(self._model.device),
        )

    def _take_latents(self, row: Row) -> Failures:
        """Move a row's result from registers to latents; the row fails if a valid frame is not a number."""
        if row.state is None:
            raise RuntimeError("a row ended without registers")
        latents = row.state[row.plan.sampler.result_register]
        row.state = row.kept = row.conditioning = None
        if not bool(torch.isfinite(latents[:, : row.plan.valid_frames]).all()):
            return [(row, GenerationError("the model made latents that are not numbers"))]
        row.latents = latents
        card = self._model.spec.card
        row.audio = make_assembly(
            row.plan, hop=self._model.spec.hop, channels=card.channels, is_fixed=self._pace.is_fixed
        )
        return []

    def _timed(self, work: Work, shapes: Sequence[tuple[int, int]], *, run: Callable[[], Result]) -> Result:
        """Run device work and correct the cost model by the measured time of its calls, (rows, frames) each."""
        started_at = self._clock.monotonic()
        result = run()
        self._executor.synchronize()
        ms = (self._clock.monotonic() - started_at) * 1000.0
        if work == "denoise":
            self._pace.saw_step(ms)
        self._cost.correct(work, shapes, measured_ms=ms)
        self._metrics.observe(f"engine_{work}_ms", ms)
        return result


def _alone(row: Row, *actions: Callable[[Row], None]) -> Failures:
    """Run actions for a single row. Returns the row as failed if one of them raises."""
    try:
        for action in actions:
            action(row)
    except DEVICE_LOST:
        raise
    except Exception as error:  # noqa: BLE001 - the engine's edge
        return [(row, error)]
    return []


def _prompts(row: Row) -> list[str]:
    """Returns the row's prompt and, if it has one, its negative prompt."""
    negative = row.plan.negative_prompt
    return [row.plan.prompt] if negative is None else [row.plan.prompt, negative]


def _lengths_left(row: Row) -> tuple[int, ...]:
    """Returns the latent frames of each source window still to encode."""
    return tuple(frames for source in row.sources.values() for frames in source.lengths_left)
