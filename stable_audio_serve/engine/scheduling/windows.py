"""Splits audio and latents into windows for the autoencoder, and joins the results. A window is a short excerpt, and
windows overlap."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, SourcePlan, WindowSpan
from stable_audio_serve.models.windows import LONGEST_FRAMES, audible_spans, window_lengths
from stable_audio_serve.sampling.noise import NoiseSource


def num_in_turn(lengths: Sequence[int]) -> int:
    """Return how many of a clip's next windows to encode or decode in one step of the engine: as many as have at most
    LONGEST_FRAMES latent frames in total, but at least one if any is left.

    The limit bounds the device memory of a step, and the time until the engine sees new and cancelled requests. A lower
    limit does not help clips that wait for denoising: with 128 frames per step, simulated p95 latencies on an H200 are
    9 to 18 % longer, and on a CPU they are the same within 2 %.
    """
    return max(bisect_right(list(accumulate(lengths)), LONGEST_FRAMES), min(1, len(lengths)))


class SourceEncoding:
    """The state of encoding one source audio window by window: the remaining windows, and the latents so far."""

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
        """The length in latent frames of each window that is not encoded yet."""
        return window_lengths(self._source.windows[self._num_done :])

    def pending(self) -> list[EncodeWindow]:
        """Return the windows to encode in the next step."""
        spans = self._source.windows[self._num_done :]
        return [
            EncodeWindow(
                samples=self._source.cut(span, hop=self._hop).contiguous(),
                start=span.start,
                stage=self._stage,
                noise=self._noise,
            )
            for span in spans[: num_in_turn(self.lengths_left)]
        ]

    def put(self, latents: Tensor) -> None:
        """Add the latents (channels, frames) float32 of the next window.

        Must be called once per window, in the order of the windows.
        """
        span = self._source.windows[self._num_done]
        if self._latents is None:
            self._latents = latents.new_zeros(latents.shape[0], self._source.frames)
        kept = latents[:, span.keep_start - span.start : span.keep_stop - span.start]
        self._latents[:, span.keep_start : span.keep_stop] = kept
        self._num_done += 1

    def latents(self) -> Tensor:
        """Return the latents of the source (channels, frames) float32. Frames outside all windows are 0.

        Raises RuntimeError if a window is not encoded yet.
        """
        if self._latents is None or self.lengths_left:
            raise RuntimeError("a source was read before all its windows were encoded")
        return self._latents


class AudioAssembly:
    """The audio of one clip, into which the decoded windows are copied. It has the exact length of the clip. Samples
    that were not generated are 0.

    Read `audio` and `is_finite` only after the device has finished the work of the last `put`, and after a call of
    `Device.collect`.
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
    ) -> None:
        """`spans` are the windows of the clip's latents."""
        self._device = device
        self._hop = hop
        self._end = min(output_samples, valid_frames * hop)
        self._left = audible_spans(spans, hop=hop, end=self._end)
        # Not `torch.zeros`, which fills the memory at once. NumPy gets zeroed memory from the operating system, in huge
        # pages: allocating and filling 120 s of stereo audio took 7 ms instead of 23 ms, in which no step was queued.
        self._audio = torch.from_numpy(np.zeros((channels, output_samples), dtype=np.float32))
        # Two flags, computed on the device and copied to the host. Index 0: whether the checked latents are finite.
        # Index 1: whether all samples so far are finite.
        self._finite_on_device: dict[int, Tensor] = {}
        self._finite = torch.ones(2, dtype=torch.bool)

    @property
    def lengths_left(self) -> tuple[int, ...]:
        """The length in latent frames of each window that is not decoded yet."""
        return window_lengths(self._left)

    def pending(self, latents: Tensor, noise: NoiseSource) -> list[DecodeWindow]:
        """Return the windows of `latents` (channels, frames) to decode in the next step."""
        return [
            DecodeWindow(latents=latents[:, span.start : span.stop].contiguous(), start=span.start, noise=noise)
            for span in self._left[: num_in_turn(self.lengths_left)]
        ]

    def check(self, latents: Tensor) -> None:
        """Record whether the latents are finite.

        Checking the audio is not enough, because the decoder can turn NaN or infinite latents into finite but wrong
        samples.
        """
        self._note_finite(0, latents)

    def put(self, audio: Tensor) -> None:
        """Add the decoded audio (channels, samples) float32 of the next window. The tensor is on the device.

        Must be called in the order of the windows. Only samples that lie within the clip and that no other window
        supplies are copied.
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
        """Whether all latents that were checked, and all samples so far, are finite."""
        return bool(self._finite.all())

    def audio(self) -> npt.NDArray[np.float32]:
        """Return the finished audio (channels, samples) float32. Samples may exceed -1..1."""
        return self._audio.numpy()
