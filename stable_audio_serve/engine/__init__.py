"""Generates audio on one device. Clips of different requests are denoised together, in shared batches. Does not use Ray
or HTTP.
"""

from stable_audio_serve.engine.engine import Engine
from stable_audio_serve.engine.options import EngineOptions

__all__ = ["Engine", "EngineOptions"]
