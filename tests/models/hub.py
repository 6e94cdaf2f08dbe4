"""A local HTTP server that imitates the Hugging Face Hub. The tests define the files of its repositories."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants, snapshot_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The hub's reason for status 403 if a fine-grained token lacks this permission.
REFUSAL = "Please enable access to public gated repositories in your fine-grained token settings"


@dataclass
class Repo:
    """A repository of the imitated hub: its files by path, and who may read them.

    If `gated`, everyone may list the files, but only requests with `token` may download them. With a `token` but not
    `gated`, the repository is private: requests without the token get the answer that it does not exist. The files
    `refused` are listed, but their download gets status 403.
    """

    files: Mapping[str, bytes]
    gated: bool = False
    token: str | None = None
    revisions: tuple[str, ...] = ("main",)
    status: int | None = None  # status of every response, if set
    refused: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # path -> wrong size to state in the list of files


@dataclass
class Hub:
    """A running imitated hub. `fetched` has the names of downloaded files; `requests` counts all requests."""

    url: str = ""
    fetched: list[str] = field(default_factory=list)
    requests: int = 0


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file of a checkpoint folder, by path, for a `Repo`."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("golden")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def pointing_library_at(
    endpoint: str, home: Path, *, token: str | None = None, is_offline: bool = False
) -> Iterator[None]:
    """Within this context, huggingface_hub in this process uses the hub at `endpoint` and the cache below `home`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        # A folder without certificates. Loading all of the system takes longer than a download here.
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(home))
        variables = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": is_offline,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }
        for name, value in variables.items():
            patch.setattr(constants, name, value)
        yield
    close_session()


def fill_cache(home: Path, repo_id: str, folder: Path) -> None:
    """Put the checkpoint in `folder` into the cache below `home`, as if `repo_id` had been downloaded from a hub."""
    with running_hub({repo_id: Repo(checkpoint_files(folder))}) as hub, pointing_library_at(hub.url, home):
        snapshot_download(repo_id)


@contextmanager
def silent_hub() -> Iterator[str]:
    """Yields the URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def running_hub(repos: Mapping[str, Repo]) -> Iterator[Hub]:
    """Serve `repos` on a free local port until the context ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._route(with_body=True)

        def do_HEAD(self) -> None:
            self._route(with_body=False)

        def log_message(self, *args: object) -> None:
            pass

        def _route(self, *, with_body: bool) -> None:
            hub.requests += 1
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[0] == "elsewhere":
                return self._file(b"<html>welcome</html>", with_body=with_body)
            is_api = parts[:2] == ["api", "models"]
            owner_and_name, rest = ("/".join(parts[2:4]), parts[4:]) if is_api else ("/".join(parts[:2]), parts[2:])
            repo = repos.get(owner_and_name)
            if repo is None:
                return self._error(401, "RepoNotFound")
            if repo.status is not None:
                return self._error(repo.status, None)
            if rest[0] == "revision":
                if rest[1] not in (*repo.revisions, COMMIT):
                    return self._error(404, "RevisionNotFound")
                siblings = [_sibling(path, content, repo) for path, content in repo.files.items()]
                return self._json({"id": owner_and_name, "sha": COMMIT, "siblings": siblings})
            if rest[0] == "tree":
                return self._json([_tree_entry(path, content) for path, content in repo.files.items()])
            may_read = repo.token is None or self.headers.get("authorization") == f"Bearer {repo.token}"
            if not may_read:
                return self._error(403 if repo.gated else 401, "GatedRepo" if repo.gated else None)
            if rest[1] not in (*repo.revisions, COMMIT):
                return self._error(404, "RevisionNotFound")
            path = "/".join(rest[2:])
            if path in repo.refused:
                return self._error(403, None, message=REFUSAL)
            if with_body:
                hub.fetched.append(path)
            return self._file(repo.files[path], with_body=with_body)

        def _error(self, status: int, code: str | None, *, message: str | None = None) -> None:
            self.send_response(status)
            self.send_header("X-Request-Id", f"Root={hub.requests}")
            if code:
                self.send_header("X-Error-Code", code)
            if code or message:
                self.send_header("X-Error-Message", message or str(code))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, content: bytes, *, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{_etag(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _sibling(path: str, content: bytes, repo: Repo) -> dict[str, object]:
    return {"rfilename": path, "size": repo.sizes.get(path, len(content)), "blobId": _etag(content)}


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
