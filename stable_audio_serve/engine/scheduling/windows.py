"""Splits latents and audio into autoencoder windows and joins the results. Independent of the queue and the model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, SourcePlan, WindowRule, WindowSpan
from stable_audio_serve.models.windows import LONGEST_FRAMES, cut_windows
from stable_audio_serve.sampling.noise import NoiseSource


def count_fitting(lengths: Sequence[int], max_frames: int) -> int:
    """Return how many leading windows fit into `max_frames` latent frames; at least one if there is any."""
    return max(bisect_right(list(accumulate(lengths)), max_frames), min(1, len(lengths)))


def take_spans(spans: Sequence[WindowSpan], max_frames: int) -> Sequence[WindowSpan]:
    """Return the leading spans that fit into `max_frames` latent frames; at least one."""
    return spans[: count_fitting(window_lengths(spans), max_frames)]


def audible_spans(spans: Sequence[WindowSpan], *, hop: int, end: int) -> list[WindowSpan]:
    """Return the windows that overlap the result, which ends at sample `end`. The padding after it is not decoded."""
    return [span for span in spans if span.keep_start * hop < end]


def window_lengths(spans: Sequence[WindowSpan]) -> tuple[int, ...]:
    """Return the latent frames of each window."""
    return tuple(span.stop - span.start for span in spans)


class SourceEncoding:
    """The encoding of one source: its remaining windows and the latents so far."""

    def __init__(self, source: SourcePlan, *, stage: str, noise: NoiseSource, hop: int) -> None:
        """`stage` is init or inpaint; `hop` is the number of audio samples per latent frame."""
        self._source = source
        self._stage = stage
        self._noise = noise
        self._hop = hop
        self._num_done = 0
        self._latents: Tensor | None = None

    @property
    def lengths_left(self) -> tuple[int, ...]:
        """Latent frames of each window that is not encoded yet."""
        return window_lengths(self._source.windows[self._num_done :])

    def pending(self, max_frames: int) -> list[EncodeWindow]:
        """Return the next windows, of at most `max_frames` latent frames in total, but at least one if any is left."""
        spans = take_spans(self._source.windows[self._num_done :], max_frames)
        return [
            EncodeWindow(
                samples=self._source.cut(span, hop=self._hop).contiguous(),
                start=span.start,
                stage=self._stage,
                noise=self._noise,
            )
            for span in spans
        ]

    def put(self, latents: Tensor) -> None:
        """Add the latents (D, F_window) float32 of the next window. Must be called in the order of the windows."""
        span = self._source.windows[self._num_done]
        if self._latents is None:
            frames = max(s.keep_stop for s in self._source.windows)
            self._latents = latents.new_zeros(latents.shape[0], frames)
        kept = latents[:, span.keep_start - span.start : span.keep_stop - span.start]
        self._latents[:, span.keep_start : span.keep_stop] = kept
        self._num_done += 1

    def latents(self) -> Tensor:
        """Return all latents (D, F) float32. Raises RuntimeError before the last window."""
        if self._latents is None or self.lengths_left:
            raise RuntimeError("a source was read before all its windows were encoded")
        return self._latents


class AudioAssembly:
    """One row's audio while its windows are decoded. It has the exact length and is silent after the valid frames.

    The audio on the host and `is_finite` are valid once the device has finished the work of the last `put` and the
    downloads are collected.
    """

    def __init__(
        self,
        spans: Sequence[WindowSpan],
        *,
        device: Device,
        channels: int,
        hop: int,
        valid_frames: int,
        output_samples: int,
        rule: WindowRule | None = None,
    ) -> None:
        """With a `rule`, each call of `pending` cuts the remaining frames into new windows."""
        self._device = device
        self._hop = hop
        self._end = min(output_samples, valid_frames * hop)
        self._frames = spans[-1].stop
        self._rule = rule
        self._left = audible_spans(spans, hop=hop, end=self._end)
        self._audio = torch.zeros(channels, output_samples)
        # Two flags, on the device and on the host: whether the checked latents (0) and the samples so far (1) are
        # finite.
        self._finite_on_device: dict[int, Tensor] = {}
        self._finite = torch.ones(2, dtype=torch.bool)

    @property
    def lengths_left(self) -> tuple[int, ...]:
        """Latent frames of each window that is not decoded yet."""
        return window_lengths(self._left)

    def pending(self, latents: Tensor, noise: NoiseSource, *, max_frames: int) -> Iterator[DecodeWindow]:
        """Yield the next windows of `latents` (D, F), at most `max_frames` in total, at least one if any is left."""
        if self._rule is not None and self._left:
            longest, first = min(max_frames, LONGEST_FRAMES), self._left[0].keep_start
            cut = cut_windows(first, frames=self._frames, rule=self._rule, longest=longest)
            self._left = audible_spans(cut, hop=self._hop, end=self._end)
        for span in take_spans(self._left, max_frames):
            yield DecodeWindow(latents=latents[:, span.start : span.stop].contiguous(), start=span.start, noise=noise)

    def check(self, latents: Tensor) -> None:
        """Record whether these latents are finite. Non-finite latents can decode to finite but wrong audio."""
        self._note_finite(0, latents)

    def put(self, audio: Tensor) -> None:
        """Add the audio (C, >= hop * F_window) float32 of the next window, which is on the device.

        Must be called in the order of the windows.
        """
        span = self._left.pop(0)
        start = span.keep_start * self._hop
        stop = min(span.keep_stop * self._hop, self._end)
        offset = span.start * self._hop
        kept = audio[:, start - offset : stop - offset].float()
        for channel, target in zip(kept, self._audio[:, start:stop], strict=True):
            self._device.download(channel, target)
        self._note_finite(1, kept)

    def _note_finite(self, place: int, values: Tensor) -> None:
        finite = torch.isfinite(values).all()
        if place in self._finite_on_device:
            finite = finite & self._finite_on_device[place]
        self._finite_on_device[place] = finite
        self._device.download(finite, self._finite[place])

    @property
    def is_finite(self) -> bool:
        """Whether all checked latents and all samples so far are finite."""
        return bool(self._finite.all())

    def audio(self) -> npt.NDArray[np.float32]:
        """Return the finished audio (C, S) float32; peaks may exceed -1..1."""
        return self._audio.numpy()
