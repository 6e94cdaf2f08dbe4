"""Check a checkpoint on this machine against stored reference numbers: each component, then whole runs."""

from stable_audio_serve.verification.verify import verify

__all__ = ["verify"]
