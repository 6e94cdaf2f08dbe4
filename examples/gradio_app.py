"""A Gradio page that generates a clip from a prompt, or a variation of an uploaded clip.

    python -m venv .venv-gradio
    .venv-gradio/bin/pip install -r examples/gradio_requirements.txt ./packaging/client
    .venv-gradio/bin/python examples/gradio_app.py

Use a separate environment, because Gradio installs many packages.
"""

import argparse
import sys
from tempfile import mkdtemp

import gradio as gr

from stable_audio_serve.client import Client
from stable_audio_serve.core.errors import StableAudioError


def generate(prompt: str, duration: float, seed: float, source: str | None, strength: float) -> tuple[str, int]:
    """Generate a clip, or a variation of `source` if given. Returns the path of the audio file and the seed."""
    try:
        if source is None:
            clip = client.generate(prompt, duration=duration, seed=int(seed))
        else:
            clip = client.vary(source, prompt, duration=duration, seed=int(seed), init_noise_level=strength)
    except StableAudioError as error:
        raise gr.Error(error.message, print_exception=False) from error
    return str(clip.save(f"{folder}/{clip.request_id}.wav")), clip.seed


argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
try:
    client, folder = Client(), mkdtemp(prefix="sounds-")
    longest_s = min(model.max_duration_s for model in client.models())
except (StableAudioError, ValueError) as error:
    sys.exit(f"error: {error}")
inputs = [
    gr.Textbox(label="Prompt"),
    gr.Slider(0.5, longest_s, 4, label="Seconds"),
    gr.Number(-1, label="Seed", info="-1 = any", precision=0),
    gr.Audio(label="Source, for a variation", type="filepath"),
    gr.Slider(0, 1, 0.7, label="Strength", info="0 keeps the source"),
]
outputs = [gr.Audio(label="Clip"), gr.Number(label="Its seed")]
gr.Interface(generate, inputs, outputs, title="Stable Audio", analytics_enabled=False).launch()
