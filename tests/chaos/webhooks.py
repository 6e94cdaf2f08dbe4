"""Receive the webhooks of a chaos run. Some are refused with 503 at first, so that the server delivers them again."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

_REFUSE_EVERY = 5  # refuse the first webhook of every fifth order


@dataclass(frozen=True, slots=True)
class Notice:
    """A received webhook. `webhook_id` is the value of its header `webhook-id`, or None without the header."""

    order: int
    job: str
    webhook_id: str | None
    outcome: str  # how the job ended, in the dialect's words
    was_refused: bool
    is_genuine: bool = True  # False if the native API's signature is wrong; fal's is not checked


class Inbox:
    """Accepts webhooks at `url`/<order number>. Webhooks of the native API must be signed with `secret`."""

    def __init__(self, server: ThreadingHTTPServer, secret: str) -> None:
        self._signature = Webhook(secret)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.notices: list[Notice] = []
        self._num_seen: Counter[int] = Counter()
        self._lock = threading.Lock()

    def notified(self) -> set[int]:
        """Return the numbers of the orders whose webhook has arrived and was not refused."""
        return {notice.order for notice in self.notices if not notice.was_refused}

    def take(self, path: str, headers: Mapping[str, str], content: bytes) -> int:
        """Record a webhook that was delivered. Returns the status code to answer with."""
        order, body = int(path.strip("/")), json.loads(content)
        headers = {name.lower(): value for name, value in headers.items()}
        is_fal = "request_id" in body
        job, outcome = (body["request_id"], body["status"]) if is_fal else (body["data"]["id"], body["type"])
        is_genuine = is_fal or self._is_signed(headers, content)
        with self._lock:
            self._num_seen[order] += 1
            is_refused = order % _REFUSE_EVERY == 0 and self._num_seen[order] == 1
            self.notices.append(Notice(order, job, headers.get("webhook-id"), outcome, is_refused, is_genuine))
        return 503 if is_refused else 204

    def _is_signed(self, headers: Mapping[str, str], content: bytes) -> bool:
        try:
            self._signature.verify(content, dict(headers))
        except WebhookVerificationError:
            return False
        return True


@contextmanager
def receiving(secret: str) -> Iterator[Inbox]:
    """Receive webhooks on a free port until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(inbox.take(self.path, dict(self.headers), content))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        inbox = Inbox(server, secret)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield inbox
        server.shutdown()
        thread.join()
