"""Calls vLLM-Omni's API with the package `openai`: lists the models, then posts to `/v1/audio/generate`.

The package has no method for this route, so the program uses the generic method `post`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import openai

BASE = os.environ.get("BASE", "http://localhost:8000")
SECONDS = float(os.environ.get("DURATION", "5"))


def main() -> None:
    """Generate a clip and write it to waves.flac."""
    client = openai.OpenAI(base_url=f"{BASE}/v1", api_key=os.environ.get("VLLM_API_KEY", "any"))
    model = next(iter(client.models.list())).id
    body = {"model": model, "input": "ocean waves", "audio_length": SECONDS, "response_format": "flac", "seed": 42}
    answer = client.post("/audio/generate", body=body, cast_to=openai.HttpxBinaryResponseContent)
    Path("waves.flac").write_bytes(answer.content)
    print("waves.flac", model)


if __name__ == "__main__":
    try:
        main()
    except openai.OpenAIError as error:
        sys.exit(f"error: {BASE}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
