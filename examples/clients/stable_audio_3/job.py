"""Calls the jobs API of the Stable Audio 3 server with `requests`: submits and polls a job, then downloads the clip."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import requests

BASE = os.environ.get("BASE", "http://localhost:8000")
SECONDS = float(os.environ.get("DURATION", "5"))
PAUSE_S = float(os.environ.get("PAUSE_S", "1"))


def answer(response: requests.Response) -> dict[str, Any]:
    """Returns the JSON body. Raises requests.HTTPError for an error status."""
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


def main() -> None:
    """Generate a clip as a job and write it to kick.wav."""
    body = {"prompt": "a kick drum", "duration": SECONDS}
    job = answer(requests.post(f"{BASE}/jobs", json=body, timeout=60))
    status_url = job["status_url"]
    while job["status"] in ("queued", "running"):
        time.sleep(PAUSE_S)
        job = answer(requests.get(status_url, timeout=60))
    if job["status"] != "succeeded":
        sys.exit(f"error: the job is {job['status']}: {job['error']}")
    audio = requests.get(job["download_url"], timeout=600)
    audio.raise_for_status()
    Path("kick.wav").write_bytes(audio.content)
    print("kick.wav", job["model"], job["duration"])


if __name__ == "__main__":
    try:
        main()
    except requests.RequestException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
