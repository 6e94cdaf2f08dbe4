"""An S3 service over HTTP for tests: moto's server, behind a proxy that injects errors, delays and outages.

All servers in a process share moto's state, so each test creates its own bucket.
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

from stable_audio_serve.core.settings import StorageSettings

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "test-key", "test-secret"

# Let all boto3 clients share a loader. Otherwise each client parses botocore's description of S3 again.
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)

_ANSWERS = ((500, "InternalError"), (503, "SlowDown"))
_NUMBERS = itertools.count()
_POLL_S = 0.02
_UPSTREAM_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults that the proxy injects. `errors` and `cuts` are the fractions of requests that are hit, at random."""

    errors: float = 0.0  # answers 500 InternalError or 503 SlowDown; half of these requests are executed nevertheless
    cuts: float = 0.0  # resets the connection; half of these requests are executed, and only the response is cut
    delay_s: float = 0.0  # seconds to wait before a request is forwarded
    answer: tuple[int, str] | None = None  # answers every request with this status and S3 error code
    region: str = ""  # requests that are signed for another region are refused, with the name of this one
    only: str = ""  # faults hit only requests with this text in `METHOD /path?query`
    is_down: bool = False  # every connection is reset
    is_silent: bool = False  # requests are accepted but never answered
    ignores_ranges: bool = False  # the header Range has no effect
    truncates: bool = False  # responses end in the middle of the body


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class FaultyProxy:
    """A proxy in front of one HTTP server. The proxy injects `faults`, which a test may replace at any time.

    An item of `fates` decides what happens to the next request whose `METHOD /path?query` contains the item's key. The
    item's value is one of these: `error`, `error-after` (the request is executed first), `cut`, `cut-answer`, `deny`
    (403), `swallow` (200 without a body, and the request is not executed), or `lost`. A `lost` request is executed, but
    answered with NoSuchUpload as if it had been sent before.
    """

    def __init__(self, port: int, *, seed: int = 0) -> None:
        """`port` is the port of the server behind the proxy, on this machine."""
        self.faults = Faults()
        self.fates: dict[str, str] = {}
        self.num_requests = 0
        self.num_errors = 0
        self.num_cuts = 0
        self.requests: list[str] = []  # `METHOD /path?query` of each request since `reset`
        self._upstream_port = port
        self._uploads: dict[bytes, datetime] = {}
        self._seed = seed
        self._random = random.Random(seed)  # decides which requests are hit
        self._choice = random.Random(seed)  # chooses their errors; apart, so that the order of threads has no effect
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True)

    def reset(self) -> None:
        """Remove all faults and fates, and forget the recorded requests.

        The random faults begin anew, so that those of a test do not depend on the tests before it.
        """
        self.faults = Faults()
        self._random.seed(self._seed)
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
        """Record a request and decide what happens to it: `pass`, an item of `fates`, or a random error or cut."""
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
        """Returns the status and the S3 error code of a randomly chosen error."""
        with self._lock:
            return self._choice.choice(_ANSWERS)

    def forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> tuple[int, Any, bytes]:
        """Forward a request. Returns status, headers and body of the server's response."""
        left_out = {"connection", "expect"} | ({"range"} if self.faults.ignores_ranges else set())
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in left_out:
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.headers, self._dated(answer.read())
        finally:
            connection.close()

    def _dated(self, answer: bytes) -> bytes:
        """Correct the dates in a list of multipart uploads, which moto always sets to 2010.

        Returns the corrected list.
        """
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
        """Log nothing."""

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
        if faults.region and f"/{faults.region}/" not in self.headers.get("Authorization", ""):
            return self._answer_error(400, "AuthorizationHeaderMalformed")
        if fate == "swallow":
            return self._answer(200, [("Content-Length", "0")], b"", False)
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
        is_cut = fate == "cut-answer" or (faults.truncates and faults.only in request)
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
        if is_cut:  # closed without a reset, so that the client receives the first part of the response
            self.close_connection = True

    def _answer_error(self, status: int, code: str) -> None:
        region = self.proxy.faults.region
        fields = f"<Code>{code}</Code><Message>injected</Message><Region>{region}</Region>"
        text = f"<?xml version='1.0'?><Error>{fields}</Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._answer(status, [*headers, ("x-amz-bucket-region", region)], body, False)

    def _cut(self) -> None:
        """Reset the TCP connection, so that the client's reads and writes fail at once."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@dataclass
class ObjectStorage:
    """The S3 service. The code under test uses it through `proxy`. Tests inspect it directly with `client`."""

    proxy: FaultyProxy
    server_url: str
    client: Any = field(init=False)  # a boto3 client that does not use the proxy

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
        """Create an empty bucket and return its name."""
        name = f"bucket-{next(_NUMBERS)}"
        self.client.create_bucket(Bucket=name)
        return name

    def settings(self, bucket: str, **overrides: Any) -> StorageSettings:
        """Returns settings that store files in `bucket`, through the proxy."""
        settings = {"bucket": bucket, "endpoint_url": self.proxy.url}
        settings |= {"access_key_id": ACCESS_KEY_ID, "secret_access_key": SECRET_ACCESS_KEY}
        return StorageSettings.model_validate(settings | overrides)

    @contextmanager
    def requiring_keys(self, *actions: str) -> Iterator[tuple[str, str]]:
        """Within this context, the service checks signatures and permissions.

        Yields the id and the secret of an access key that permits these S3 actions.
        """
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
        """Returns environment variables that make a server store files in `bucket`, through the proxy."""
        return {
            "STABLE_AUDIO_STORAGE_BUCKET": bucket,
            "STABLE_AUDIO_STORAGE_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            **variables,
        }

    def keys(self, bucket: str) -> list[str]:
        """Returns the keys of all objects in a bucket, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def read(self, bucket: str, key: str) -> bytes:
        """Returns the bytes of one object."""
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def unfinished(self, bucket: str) -> list[str]:
        """Returns the keys of multipart uploads that are neither completed nor aborted."""
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@contextmanager
def running_object_storage(*, seed: int = 0) -> Iterator[ObjectStorage]:
    """Run the S3 service and its proxy on free local ports until the context ends."""
    from moto.server import ThreadedMotoServer  # imported here: moto loads slowly, and few tests need it

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
