"""Calls vLLM-Omni's `/v1/audio/generate` with `requests`, in the same way as vLLM-Omni's example client."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import requests

BASE = os.environ.get("BASE", "http://localhost:8000")


def main() -> None:
    """Generate one clip and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="The sound of a hammer hitting a wooden surface")
    parser.add_argument("--audio-length", type=float, default=10.0)
    parser.add_argument("--num-inference-steps", type=int, default=100)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, default=Path("hammer.wav"))
    arguments = parser.parse_args()
    body = {
        "input": arguments.text,
        "audio_length": arguments.audio_length,
        "audio_start": 0.0,
        "negative_prompt": "Low quality",
        "guidance_scale": 7.0,
        "num_inference_steps": arguments.num_inference_steps,
        "response_format": arguments.output.suffix.removeprefix("."),
    }
    if arguments.seed is not None:
        body["seed"] = arguments.seed
    response = requests.post(f"{BASE}/v1/audio/generate", json=body, timeout=300)
    if response.status_code != 200:
        sys.exit(f"error: {response.status_code}: {response.text}")
    arguments.output.write_bytes(response.content)
    print(arguments.output)


if __name__ == "__main__":
    try:
        main()
    except requests.RequestException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
