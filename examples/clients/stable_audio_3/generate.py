"""Calls the API of the Stable Audio 3 server with `requests`: a clip, then a variation and an extension of the clip."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import requests

BASE = os.environ.get("BASE", "http://localhost:8000")
SECONDS = float(os.environ.get("DURATION", "5"))


def call(path: str, **request: object) -> bytes:
    """Send a request and return the audio. Raises requests.HTTPError for an error status."""
    response = requests.post(f"{BASE}{path}", timeout=600, **request)  # type: ignore[arg-type]
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code}: {response.text}")
    print(path, response.headers["X-Model"], response.headers["X-Sample-Rate"], flush=True)
    return response.content


def main() -> None:
    """Generate a clip, a variation and an extension, and write them to tone.wav, organ.wav and longer.wav."""
    tone = call("/v1/audio/generations", json={"prompt": "a 440 Hz sine tone", "duration": SECONDS, "seed": 7})
    Path("tone.wav").write_bytes(tone)

    fields = {"prompt": "an organ playing a 4", "duration": SECONDS, "init_noise_level": 0.7}
    Path("organ.wav").write_bytes(call("/v1/audio/variations", data=fields, files={"audio": tone}))

    # To continue the source, inpaint a region that begins where the source ends.
    until = SECONDS + 2
    region = {"duration": until, "inpaint_start_seconds": SECONDS, "inpaint_end_seconds": until}
    fields = {"prompt": "a 440 Hz sine tone", **region}
    Path("longer.wav").write_bytes(call("/v1/audio/inpaint", data=fields, files={"audio": tone}))


if __name__ == "__main__":
    try:
        main()
    except requests.RequestException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
