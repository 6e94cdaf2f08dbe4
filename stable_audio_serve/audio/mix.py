"""Mixes the channels of source audio. Independent of models and torch."""

from __future__ import annotations

from dataclasses import replace

from stable_audio_serve.core.generation import SourceAudio


def to_mono(audio: SourceAudio) -> SourceAudio:
    """Returns the mean of all channels as one channel."""
    return replace(audio, samples=audio.samples.mean(axis=0, keepdims=True), is_mixed=True)
