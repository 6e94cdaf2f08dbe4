"""`python -m stable_audio_serve.cli`."""

from stable_audio_serve.cli.main import app

app()
