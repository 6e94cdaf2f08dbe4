"""Draws batches for training the denoiser (stage 2): captions, latents, timelines and edit masks of random scenes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.demo_model import architecture
from examples.demo_model.architecture import FRAME_S, HEADROOM_S, LONGEST_TRAINED_S, PATCH_FRAMES
from examples.demo_model.captions import caption
from examples.demo_model.scenes import SHARES, Scene, draw_scene
from examples.demo_model.synthesis import render_scene
from examples.demo_model.train_autoencoder import Autoencoder
from examples.demo_model.vocabulary import MAX_TOKENS, build_tokenizer
from stable_audio_serve.models.oscillator.bank import SAMPLE_RATE_HZ
from stable_audio_serve.models.oscillator.timeline import timeline_features

HEADROOM_LATENTS = int(HEADROOM_S * SAMPLE_RATE_HZ / architecture.HOP)

# Many batches are short clips of pitched sounds, because one second is enough to learn a pitch.
BRIEF_S = 1.4
_BRIEF_SHARES = {
    "tone": 0.56,
    "chord": 0.14,
    "sweep": 0.21,
    "noise": 0.03,
    "hit": 0.03,
    "hush": 0.015,
    "silence": 0.015,
}


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """The lengths of clips and the sizes of batches."""

    batch_latents: int = 1100
    shortest_s: float = 0.5
    longest_s: float = LONGEST_TRAINED_S
    brief_share: float = 0.37


@dataclass(frozen=True, slots=True)
class Batch:
    """The clips of a training step: B clips of F latent frames.

    `latents` (B, channels, F) encode `frames` (B, 222, 8 F); `valid` (B, F) is false for padding. `tokens` and `mask`
    (B, tokens) are the captions, `seconds` (B,) the durations, `local` (B, features, F) the per-frame conditioning.
    `unnamed` (B,) marks clips without a caption and without kept latents. The denoiser can recognise these clips only
    by the noised latents, so training does not use them at the highest noise levels. `own_tokens` and `own_mask`
    (B, tokens) are captions of what the clip sounds like. They differ from `tokens` and `mask` only if the
    `ClipSource` has a `change`.
    """

    latents: Tensor
    valid: Tensor
    tokens: Tensor
    mask: Tensor
    seconds: Tensor
    local: Tensor
    unnamed: Tensor
    frames: Tensor
    own_tokens: Tensor
    own_mask: Tensor

    def to(self, device: str) -> Batch:
        """Returns a copy of the batch on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in Batch.__slots__}
        return Batch(**tensors)


class ClipSource:
    """Draws batches of new random clips of similar length, encoded by the frozen autoencoder."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        config: ClipConfig,
        *,
        rng: np.random.Generator,
        change: Callable[[Scene], Scene] | None = None,
    ) -> None:
        """If `change` is given, a clip has the caption of a random scene and the sound of the changed scene."""
        self._autoencoder = autoencoder.eval()
        self._change = change
        self._config = config
        self._rng = rng
        self._tokenizer = padded_tokenizer()

    def draw(self) -> Batch:
        """Draw one batch, on the CPU. The autoencoder scales the latents to mean 0 and standard deviation 1."""
        rng, config = self._rng, self._config
        brief = rng.random() < config.brief_share
        if brief:
            longest = float(rng.uniform(config.shortest_s, BRIEF_S))
        else:
            longest = float(np.exp(rng.uniform(np.log(config.shortest_s), np.log(config.longest_s))))
        frames = num_latents(longest) + HEADROOM_LATENTS
        count = int(np.clip(config.batch_latents // (frames + 6), 4, 64))
        seconds = np.maximum(longest * rng.uniform(0.75, 1.0, count), config.shortest_s)
        seconds = np.round(np.append(longest, seconds[1:]), 2)
        scenes = [draw_scene(rng, shares=_BRIEF_SHARES if brief else SHARES) for _ in range(count)]
        edits = rng.random(count) < 0.25
        withheld = rng.random(count) < np.where(edits, 0.5, 0.12)
        sounds = [self._change(scene) for scene in scenes] if self._change else scenes
        captions = ["" if blank else caption(scene, rng) for scene, blank in zip(scenes, withheld, strict=True)]
        unnamed = withheld & ~edits & np.array([scene.kind != "hush" for scene in scenes])
        clips = [
            render_scene(sound, rng, duration_s=float(length), num_frames=frames * PATCH_FRAMES)
            for sound, length in zip(sounds, seconds, strict=True)
        ]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            frames_of = torch.from_numpy(np.stack(clips)).transpose(1, 2)
            latents = self._autoencoder.encoder(frames_of).float()
        valid = torch.tensor([[n < num_latents(s) + HEADROOM_LATENTS for n in range(frames)] for s in seconds])
        own = captions
        if self._change:
            own = [text and caption(sound, rng) for text, sound in zip(captions, sounds, strict=True)]
        tokens, mask = self._tokenize(captions)
        own_tokens, own_mask = self._tokenize(own)
        return Batch(
            latents,
            valid,
            tokens,
            mask,
            torch.tensor(seconds, dtype=torch.float32),
            self._local(latents, scenes, seconds=seconds, edits=edits),
            torch.from_numpy(unnamed),
            frames_of,
            own_tokens,
            own_mask,
        )

    def _tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Returns the tokens (captions, tokens) and their mask."""
        encoded = self._tokenizer.encode_batch(captions)
        masks = torch.tensor([entry.attention_mask for entry in encoded]).bool()
        return torch.tensor([entry.ids for entry in encoded]), masks

    def _local(self, latents: Tensor, scenes: list[Scene], *, seconds: np.ndarray[Any, Any], edits: Any) -> Tensor:
        count, _, frames = latents.shape
        keep = torch.zeros(count, 1, frames)
        for row in np.flatnonzero(edits):
            keep[row, 0] = self._keep_mask(frames, num_latents(float(seconds[row])))
        lines = [
            timeline_features(frames, frame_s=FRAME_S, seconds_total=float(length), tempo_bpm=scene.tempo_bpm)
            for scene, length in zip(scenes, seconds, strict=True)
        ]
        return torch.cat([keep, keep * latents, torch.stack(lines)], dim=1)

    def _keep_mask(self, frames: int, sounding: int) -> Tensor:
        """Draw a mask of the latents that an edit keeps: a prefix, a suffix, or all except one or two regions."""
        keep = torch.zeros(frames)
        first, second, third, fourth = sorted(self._rng.integers(1, max(sounding, 2), size=4))
        kind = self._rng.random()
        if kind < 0.45:
            keep[:second] = 1.0
        elif kind < 0.6:
            keep[third:sounding] = 1.0
        else:
            keep[:sounding] = 1.0
            keep[first : max(second if kind < 0.75 else third, first + 1)] = 0.0
            if kind < 0.75:
                keep[third:fourth] = 0.0
        return keep


def prefetched(source: ClipSource, stop: threading.Event, *, depth: int = 3) -> Iterator[Batch]:
    """Yield batches from `source`. Until `stop` is set, another thread draws up to `depth` batches in advance."""
    batches: queue.Queue[Batch] = queue.Queue(depth)

    def fill() -> None:
        while not stop.is_set():
            batch = source.draw()
            while not stop.is_set():
                try:
                    batches.put(batch, timeout=1.0)
                    break
                except queue.Full:
                    continue

    threading.Thread(target=fill, name="clips", daemon=True).start()
    while True:
        yield batches.get()


def padded_tokenizer() -> Tokenizer:
    """Returns the demo model's tokenizer, set to truncate and pad every prompt to the model's prompt length."""
    tokenizer = build_tokenizer()
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS, pad_id=0, pad_token="<pad>")
    return tokenizer


def num_latents(seconds: float) -> int:
    """Returns the number of latents that cover a clip of `seconds`."""
    return -(-int(seconds * SAMPLE_RATE_HZ) // architecture.HOP)
