"""Calls fal's model `fal-ai/stable-audio` with `fal-client`: a direct call, a queued request, a subscription.

`fal-client` connects with TLS. If your server has TLS, you only need to set FAL_RUN_HOST and FAL_QUEUE_RUN_HOST to its
host name. For plain HTTP, set the two URL formats as below.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("FAL_KEY", "any")

import fal_client
import fal_client.client
import httpx

BASE = os.environ.get("BASE", "http://localhost:8000")
fal_client.client.RUN_URL_FORMAT = f"{BASE}/"
fal_client.client.QUEUE_URL_FORMAT = f"{BASE}/queue/"

APP = "fal-ai/stable-audio"
CLIP = {"seconds_total": int(os.environ.get("DURATION", "5")), "steps": int(os.environ.get("STEPS", "100"))}


def save(output: dict[str, dict[str, str]], path: str) -> None:
    """Download the audio file whose URL is in `output`, and write it to `path`."""
    Path(path).write_bytes(httpx.get(output["audio_file"]["url"], timeout=600).raise_for_status().content)
    print(path, flush=True)


def main() -> None:
    """Generate three clips and write them to run.wav, queue.wav and subscribe.wav."""
    save(fal_client.run(APP, CLIP | {"prompt": "a kick drum"}), "run.wav")

    handle = fal_client.submit(APP, CLIP | {"prompt": "rain on a tin roof"})
    for event in handle.iter_events(with_logs=True):
        print(type(event).__name__, flush=True)
    save(handle.get(), "queue.wav")

    loop = CLIP | {"prompt": "128 BPM tech house drum loop"}
    save(fal_client.subscribe(APP, loop, with_logs=True, on_queue_update=print), "subscribe.wav")


if __name__ == "__main__":
    try:
        main()
    except (fal_client.client.FalClientError, httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(f"error: {BASE}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
