"""Receive the server's webhooks: verify the signature, then download the audio of each succeeded job once.

    pip install standardwebhooks
    export STABLE_AUDIO_WEBHOOK_SECRET=whsec_...   # the server's secret
    python webhook_receiver.py --port 9000 --out sounds/
    stable-audio-serve jobs submit "rain on a tin roof" --webhook http://this-machine:9000/

By default, a server delivers to public addresses only. Add a private address to its setting `jobs.webhook_allow_hosts`.
"""

from __future__ import annotations

import argparse
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

from stable_audio_serve.client import Client
from stable_audio_serve.core.errors import StableAudioError

MOST_BYTES = 1_000_000


def store(event: dict[str, Any], client: Client, *, folder: Path) -> None:
    """Download the audio of a succeeded job, unless it exists already. A webhook may arrive more than once."""
    job_id = event["data"]["id"]
    if event["type"] != "job.succeeded":
        print(f"{event['type']}: {job_id} {event['data']['error'] or ''}", flush=True)
    elif not any(folder.glob(f"{job_id}-*")):
        print(client.jobs.download(job_id, folder), flush=True)


class Receiver(BaseHTTPRequestHandler):
    """Handles webhooks. The response is 204 if a webhook was handled; after any other status, the server retries."""

    signer: Webhook
    client: Client
    folder: Path
    timeout = 10.0

    def do_POST(self) -> None:
        self.send_response(self.handle_event())
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle_event(self) -> int:
        """Verify one webhook and store its audio. Returns the HTTP status of the response."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            event = self.signer.verify(self.rfile.read(int(length)), headers)
        except WebhookVerificationError as error:
            self.log_error("refused: %s", error)
            return 401
        try:
            store(event, self.client, folder=self.folder)
        except (StableAudioError, OSError) as error:
            self.log_error("not stored, the server will retry: %s", error)
            return 503
        return 204


def main() -> None:
    """Run the program: receive webhooks until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--out", type=Path, default=Path("sounds"), help="output folder")
    arguments = parser.parse_args()
    secret = os.environ.get("STABLE_AUDIO_WEBHOOK_SECRET")
    if not secret:
        raise ValueError("STABLE_AUDIO_WEBHOOK_SECRET is not set")
    arguments.out.mkdir(parents=True, exist_ok=True)
    Receiver.folder = arguments.out
    Receiver.signer = Webhook(secret)
    with Client() as Receiver.client, ThreadingHTTPServer((arguments.host, arguments.port), Receiver) as server:
        print(f"listens on http://{arguments.host}:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except (StableAudioError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
