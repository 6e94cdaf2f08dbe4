"""An S3 service over HTTP (moto's server), behind a proxy that answers errors, cuts connections, delays or is down.

Everything in one process shares moto's memory: a test makes a bucket of its own.
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import botocore.loaders
import botocore.session
import httpx
from botocore.config import Config
from moto.server import ThreadedMotoServer

from stable_audio_serve.core.settings import StorageSettings

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "test-key", "test-secret"

# Every client reads and parses the description of S3 anew, but those of one loader.
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)

_ANSWERS = ((500, "InternalError"), (503, "SlowDown"))
_NUMBERS = itertools.count()
_POLL_S = 0.02
_UPSTREAM_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Faults:
    """What befalls requests; errors and cuts as shares of all of them, drawn once per request."""

    errors: float = 0.0  # 500 InternalError or 503 SlowDown; every second one although the request was carried out
    cuts: float = 0.0  # connection reset in the middle of the request, or of the answer to one that was carried out
    delay_s: float = 0.0  # before a request is carried out
    answer: tuple[int, str] | None = None  # status and S3 error code that every request gets instead
    only: str = ""  # spares requests without this text in `METHOD /path?query`
    is_down: bool = False  # every connection is reset
    is_silent: bool = False  # requests are taken and never answered


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away: that is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class FaultyProxy:
    """Stands before one HTTP server. `faults` may be replaced at any time and applies to the next request.

    `fates` are for single requests: the first one with the text in `METHOD /path?query` gets `error`, `error-after`,
    `cut`, `cut-answer`, `deny` (403) or `lost` (carried out, and answered with NoSuchUpload as if it had been before).
    """

    def __init__(self, port: int, *, seed: int = 0) -> None:
        """Before the server on `port` of this machine."""
        self.faults = Faults()
        self.fates: dict[str, str] = {}
        self.num_requests = 0
        self.num_errors = 0
        self.num_cuts = 0
        self.requests: list[str] = []  # `METHOD /path?query` of each
        self._upstream_port = port
        self._uploads: dict[bytes, datetime] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True)

    def reset(self) -> None:
        """Let everything pass again, and forget what passed."""
        self.faults = Faults()
        self.fates.clear()
        self.requests.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.faults = Faults(is_down=True)
        self._server.shutdown()
        self._server.server_close()

    def draw(self, request: str) -> str:
        """What is to happen to the next request: `pass`, `error`, `error-after`, `cut`, `cut-answer`."""
        faults = self.faults
        with self._lock:
            self.num_requests += 1
            self.requests.append(request)
            for text in self.fates:
                if text in request:
                    return self.fates.pop(text)
            share, is_after = self._random.random(), self._random.random() < 0.5
            if faults.only not in request or share >= faults.errors + faults.cuts:
                return "pass"
            if share < faults.errors:
                self.num_errors += 1
                return "error-after" if is_after else "error"
            self.num_cuts += 1
            return "cut-answer" if is_after else "cut"

    def pick_answer(self) -> tuple[int, str]:
        """An error to answer with."""
        with self._lock:
            return self._random.choice(_ANSWERS)

    def forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> tuple[int, Any, bytes]:
        """Status, headers and body of the server's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.headers, self._dated(answer.read())
        finally:
            connection.close()

    def _dated(self, answer: bytes) -> bytes:
        """The answer with the times at which multipart uploads began, where moto says 2010."""
        upload_ids = re.findall(rb"<UploadId>([^<]+)</UploadId>", answer[:1_000_000])
        for upload_id in upload_ids:
            begun_at = self._uploads.setdefault(upload_id, datetime.now(UTC))
            text = begun_at.strftime("%Y-%m-%dT%H:%M:%S.000Z").encode()
            answer = answer.replace(b"<Initiated>2010-11-10T20:48:33.000Z<", b"<Initiated>" + text + b"<", 1)
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, proxy: FaultyProxy, *args: Any) -> None:
        self.proxy = proxy
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        proxy, request = self.proxy, f"{self.command} {self.path}"
        fate, faults = proxy.draw(request), proxy.faults
        if faults.is_down:
            return self._cut()
        num_bytes = int(self.headers.get("Content-Length", 0))
        if fate == "cut":
            self.rfile.read(num_bytes // 2)
            return self._cut()
        body = self.rfile.read(num_bytes)
        while faults.is_silent:
            threading.Event().wait(_POLL_S)
            if not proxy.faults.is_silent:
                return self._cut()
        if faults.delay_s:
            threading.Event().wait(faults.delay_s)
        if faults.answer is not None and faults.only in request:
            return self._answer_error(*faults.answer)
        if fate == "deny":
            return self._answer_error(403, "AccessDenied")
        if fate == "error":
            return self._answer_error(*proxy.pick_answer())
        status, headers, content = proxy.forward(self.command, self.path, self.headers.items(), body)
        if fate == "lost":
            return self._answer_error(404, "NoSuchUpload")
        if fate == "error-after":
            return self._answer_error(*proxy.pick_answer())
        if fate == "cut-answer" and not content:
            return self._cut()
        is_cut = fate == "cut-answer"
        return self._answer(status, headers.items(), content[: len(content) // 2] if is_cut else content, is_cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _answer(self, status: int, headers: Any, content: bytes, is_cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if is_cut:  # not by a reset, so that what was sent still arrives
            self.close_connection = True

    def _answer_error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body, False)

    def _cut(self) -> None:
        """Reset the connection, so that whoever reads or writes fails at once."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@dataclass
class ObjectStorage:
    """The service: to be used through `proxy`, and looked into past it."""

    proxy: FaultyProxy
    server_url: str
    client: Any = field(init=False)  # boto3's, past the proxy

    def __post_init__(self) -> None:
        self.client = self._connect("s3")

    def _connect(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.server_url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )

    def make_bucket(self) -> str:
        """A new, empty one."""
        name = f"bucket-{next(_NUMBERS)}"
        self.client.create_bucket(Bucket=name)
        return name

    def settings(self, bucket: str, **overrides: Any) -> StorageSettings:
        """Settings with which a store keeps its files in `bucket`, through the proxy."""
        settings = {"bucket": bucket, "endpoint_url": self.proxy.url}
        settings |= {"access_key_id": ACCESS_KEY_ID, "secret_access_key": SECRET_ACCESS_KEY}
        return StorageSettings.model_validate(settings | overrides)

    @contextmanager
    def requiring_keys(self, *actions: str) -> Iterator[tuple[str, str]]:
        """Let the service check signatures and permissions; an access key that may do `actions`, and its secret."""
        iam = self._connect("iam")
        user = f"user-{next(_NUMBERS)}"
        iam.create_user(UserName=user)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=user, PolicyName="policy", PolicyDocument=policy)
        url = f"{self.server_url}/moto-api/reset-auth"
        httpx.post(url, content="0")
        try:
            yield key["AccessKeyId"], key["SecretAccessKey"]
        finally:
            httpx.post(url, content="inf")

    def environ(self, bucket: str, **variables: str) -> dict[str, str]:
        """Variables with which a server keeps its files in `bucket`, through the proxy."""
        return {
            "STABLE_AUDIO_STORAGE_BUCKET": bucket,
            "STABLE_AUDIO_STORAGE_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            **variables,
        }

    def keys(self, bucket: str) -> list[str]:
        """Of every object in a bucket, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def read(self, bucket: str, key: str) -> bytes:
        """The bytes of one object."""
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted."""
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@contextmanager
def running_object_storage(*, seed: int = 0) -> Iterator[ObjectStorage]:
    """The service on free ports of this machine, for the length of the context."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        proxy = FaultyProxy(port, seed=seed)
        proxy.start()
        try:
            yield ObjectStorage(proxy, f"http://127.0.0.1:{port}")
        finally:
            proxy.close()
    finally:
        server.stop()
