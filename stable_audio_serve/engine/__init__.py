"""Batches rows into denoising steps on one device and runs them. Independent of Ray and HTTP."""

from stable_audio_serve.engine.engine import Engine
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.thread import EngineHeartbeat

__all__ = ["Engine", "EngineHeartbeat", "EngineOptions"]
