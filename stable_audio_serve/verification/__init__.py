"""Checks a checkpoint on this machine against stored reference numbers, component by component and end to end."""

from stable_audio_serve.verification.verify import verify

__all__ = ["verify"]
