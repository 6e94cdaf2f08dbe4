"""Calls the Stable Audio Open Small API with `requests`: a drum loop, its style transfer, and a loop from a riff."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import requests

BASE = os.environ.get("BASE", "http://localhost:8000")


def call(path: str, form: dict[str, object], *, files: dict[str, bytes] | None = None) -> bytes:
    """Send a form and return the audio. Raises requests.HTTPError for an error status."""
    response = requests.post(f"{BASE}{path}", data=form | {"return_format": "base64"}, files=files, timeout=600)
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code}: {response.text}")
    answer = response.json()
    metadata = answer["metadata"]
    print(metadata["prompt"], metadata["bars"], "bars,", metadata["loop_duration_seconds"], "s", flush=True)
    return base64.b64decode(answer["audio_base64"])


def main() -> None:
    """Generate three loops and write them to drums.wav, break.wav and riff.wav."""
    techno = {"prompt": "aggressive techno 140bpm", "loop_type": "drums", "bars": 4, "cfg_scale": 1.0, "seed": 7}
    drums = call("/generate/loop", techno)
    Path("drums.wav").write_bytes(drums)

    dusty = {"prompt": "dusty breakbeat 120bpm", "style_strength": 0.7}
    Path("break.wav").write_bytes(call("/generate/loop", dusty, files={"audio_file": drums}))

    keys = requests.get(f"{BASE}/riffs/available", timeout=60).json()["available_keys"]
    riff = {"prompt": "dark techno 140bpm", "key": keys[0], "loop_type": "instruments"}
    Path("riff.wav").write_bytes(call("/generate/loop-with-riff", riff))


if __name__ == "__main__":
    try:
        main()
    except requests.RequestException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
