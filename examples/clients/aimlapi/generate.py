"""Calls the AIML API's model `stable-audio` with `requests`: submits and polls a request, then downloads the clip."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import requests

URL = os.environ.get("BASE", "http://localhost:8000") + "/v2/generate/audio"
HEADERS = {"Authorization": f"Bearer {os.environ.get('AIML_API_KEY', 'any')}"}
PAUSE_S = float(os.environ.get("PAUSE_S", "2"))


def answer(response: requests.Response) -> dict[str, Any]:
    """Returns the JSON body. Raises requests.HTTPError for an error status."""
    if response.status_code >= 400:
        raise requests.HTTPError(f"{response.status_code}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


def main() -> None:
    """Generate a clip and write it to generated.wav."""
    order = {
        "model": "stable-audio",
        "prompt": "lo-fi pop hip-hop ambient music",
        "seconds_total": int(os.environ.get("DURATION", "5")),
        "steps": int(os.environ.get("STEPS", "100")),
    }
    made = answer(requests.post(URL, json=order, headers=HEADERS, timeout=60))
    while made["status"] in ("queued", "generating"):
        print(made["status"], flush=True)
        time.sleep(PAUSE_S)
        made = answer(requests.get(URL, params={"generation_id": made["id"]}, headers=HEADERS, timeout=60))
    if made["status"] == "error":
        sys.exit(f"error: {made['error']['message']}")
    audio = requests.get(made["audio_file"]["url"], timeout=600)
    audio.raise_for_status()
    Path("generated.wav").write_bytes(audio.content)
    print("generated.wav")


if __name__ == "__main__":
    try:
        main()
    except requests.RequestException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
