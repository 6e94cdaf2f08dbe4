"""Decides which rows step together on one device and runs them. Knows neither Ray nor HTTP."""

from stable_audio_serve.engine.engine import Engine
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.thread import EngineHeartbeat

__all__ = ["Engine", "EngineHeartbeat", "EngineOptions"]
