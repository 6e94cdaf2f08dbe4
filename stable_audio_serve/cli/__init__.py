"""The `stable-audio-serve` command."""

from stable_audio_serve.cli.main import app

__all__ = ["app"]
