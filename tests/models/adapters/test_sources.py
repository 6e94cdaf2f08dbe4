"""Where adapter files come from: paths, URLs, objects of an S3 service, and files in repositories of a hub."""

from __future__ import annotations

import gzip
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trustme

from stable_audio_serve.artifacts.s3_client import make_client
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.models.adapters import sources
from stable_audio_serve.models.adapters.header import MAX_FILE_BYTES, inspect_file
from stable_audio_serve.models.adapters.sources import fetch_adapter, is_remote
from tests.adapter_files import write_file
from tests.models.hub import Repo, pointing_library_at, running_hub
from tests.object_storage import Faults, ObjectStorage


def refusal(source: str, *, max_bytes: int = MAX_FILE_BYTES, is_temporary: bool = False, **options: Any) -> str:
    with patch.object(sources, "MAX_FILE_BYTES", max_bytes), pytest.raises(InvalidRequestError) as caught:
        fetch_adapter(source, **options)
    assert caught.value.field == "loras"
    assert (caught.value.retry_after_s is not None) is is_temporary
    return caught.value.message


def test_paths_are_returned_as_they_are(tmp_path: Path) -> None:
    write_file(tmp_path / "vinyl.safetensors")
    for path in (tmp_path / "vinyl.safetensors", tmp_path / "missing.safetensors", Path("folder/vinyl.safetensors")):
        assert fetch_adapter(str(path)) == path
        assert not is_remote(str(path))


def test_an_existing_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch_adapter("owner/name") == Path("owner/name")
    assert is_remote("owner/other")


@pytest.mark.server
def test_objects_are_downloaded_once_per_version(object_storage: ObjectStorage, tmp_path: Path) -> None:
    bucket, cache = object_storage.make_bucket(), tmp_path / "cache"
    sha256 = write_file(tmp_path / "a.safetensors")
    source = f"s3://{bucket}/adapters/vinyl.safetensors"
    fetch = partial(fetch_adapter, open_s3=partial(make_client, object_storage.settings(bucket)), cache=cache)
    assert "cannot be downloaded" in str(refusal(source, **fetch.keywords))
    object_storage.client.upload_file(str(tmp_path / "a.safetensors"), bucket, "adapters/vinyl.safetensors")
    path = fetch(source)
    assert path.name == "vinyl.safetensors"
    assert inspect_file(path, name="vinyl").sha256 == sha256
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = path.stat()
    assert fetch(source).stat().st_mtime_ns == before.st_mtime_ns
    write_file(tmp_path / "a.safetensors", seed=2)
    object_storage.client.upload_file(str(tmp_path / "a.safetensors"), bucket, "adapters/vinyl.safetensors")
    assert fetch(source) != path
    assert not list(cache.rglob("*.part"))


@pytest.mark.server
def test_objects_may_be_in_another_region_than_the_server_s(object_storage: ObjectStorage, tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors")
    bucket = object_storage.make_bucket()
    object_storage.client.upload_file(str(tmp_path / "a.safetensors"), bucket, "vinyl.safetensors")
    object_storage.proxy.faults = Faults(region="eu-west-1")
    open_s3 = partial(make_client, object_storage.settings("own", region="us-east-1"))
    path = fetch_adapter(f"s3://{bucket}/vinyl.safetensors", open_s3=open_s3, cache=tmp_path / "cache")
    assert path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.server
def test_unusable_objects_are_refused(object_storage: ObjectStorage, tmp_path: Path) -> None:
    bucket = object_storage.make_bucket()
    object_storage.client.put_object(Bucket=bucket, Key="large.safetensors", Body=b"0" * 100)
    options = {"open_s3": partial(make_client, object_storage.settings(bucket)), "cache": tmp_path / "cache"}
    assert "larger than 99 bytes" in refusal(f"s3://{bucket}/large.safetensors", max_bytes=99, **options)
    for source in (f"s3://{bucket}", f"s3://{bucket}/", "s3:///x.safetensors", f"s3://{bucket}/x.ckpt"):
        assert "must be s3://BUCKET/KEY.safetensors" in refusal(source, **options)
    away = partial(make_client, object_storage.settings(bucket, endpoint_url="http://127.0.0.1:9"))
    refusal(f"s3://{bucket}/large.safetensors", is_temporary=True, **options | {"open_s3": away})
    assert not (tmp_path / "cache").exists()


class Site(SimpleHTTPRequestHandler):
    """Serves files, compresses `/packed/...` for clients that accept it, and redirects `/moved/...`.

    Sends `/slow/...` for six seconds, a few bytes at a time, until the client ends the connection.
    """

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(60):
                    self.wfile.write(b"slow")
                    time.sleep(0.1)
            return None
        if self.path.startswith("/packed") and "gzip" in self.headers.get("Accept-Encoding", ""):
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(gzip.compress(Path(self.translate_path("/v1.0/vinyl.safetensors")).read_bytes()))
            return None
        if not self.path.startswith("/moved"):
            return super().do_GET()
        self.send_response(302)
        self.send_header("Location", "http://127.0.0.1:1/x" if "insecure" in self.path else "/v1.0/vinyl.safetensors")
        return self.end_headers()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields the URL of a web server with TLS that serves the folder `site`."""
    (tmp_path / "site").mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=tmp_path / "site"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_of_urls_are_downloaded_once(site: str, tmp_path: Path) -> None:
    source, cache = f"{site}/v1.0/vinyl.safetensors", tmp_path / "cache"
    assert "answers with status 404" in refusal(source, cache=cache)
    (tmp_path / "site" / "v1.0").mkdir()
    sha256 = write_file(tmp_path / "site" / "v1.0" / "vinyl.safetensors")
    assert "larger than 99 bytes" in refusal(source, cache=cache, max_bytes=99)
    path = fetch_adapter(source, cache=cache)
    assert (is_remote(source), path.name) == (True, "vinyl.safetensors")
    assert inspect_file(path, name="vinyl").sha256 == sha256
    for bad in ("https://", "https://a/b.ckpt", "https://u:p@a/b.safetensors", "https://a/b.safetensors?token=x"):
        assert "must be https://HOST/PATH.safetensors" in refusal(bad, cache=cache)
    moved = fetch_adapter(f"{site}/moved/a.safetensors", cache=cache)
    assert inspect_file(moved, name="a").sha256 == sha256
    packed = fetch_adapter(f"{site}/packed/a.safetensors", cache=cache)
    assert inspect_file(packed, name="a").sha256 == sha256
    assert "redirects to a URL that is not https" in refusal(f"{site}/moved/insecure.safetensors", cache=cache)
    for host, reason in (("localhost:1", "Connection refused"), ("localhost:99999", ""), ("a..b", "invalid host name")):
        message = refusal(f"https://{host}/b.safetensors", cache=cache, is_temporary=host != "a..b")
        assert f"cannot be downloaded: {reason}" in message
        assert "rrno" not in message
    (tmp_path / "file").touch()
    message = refusal(f"{site}/moved/a.safetensors", cache=tmp_path / "file")
    assert message.endswith("cannot be downloaded: File exists")
    for content in (b"<html>down for maintenance</html>", path.read_bytes()[:-1]):
        (tmp_path / "site" / "v1.0" / "page.safetensors").write_bytes(content)
        assert "not a complete safetensors file" in refusal(f"{site}/v1.0/page.safetensors", cache=cache)
    (tmp_path / "site" / "v1.0" / "vinyl.safetensors").unlink()
    assert fetch_adapter(source, cache=cache) == path
    assert {found for found in cache.rglob("*") if found.is_file()} == {path, moved, packed}


def test_a_slow_download_ends_at_its_time_limit(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_URL_TIMEOUT_S", 0.3)
    began_s = time.monotonic()
    assert "takes more than 0.3 s" in refusal(f"{site}/slow/a.safetensors", cache=tmp_path / "cache")
    assert time.monotonic() - began_s < 4.0
    assert not [found for found in tmp_path.rglob("cache/**/*") if found.is_file()]


@pytest.mark.server
def test_files_of_repositories_are_downloaded(tmp_path: Path) -> None:
    sha256 = write_file(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    repos = {
        "lab/one": Repo({"README.md": b"x", "vinyl.safetensors": content}),
        "lab/two": Repo({"a/vinyl.safetensors": content, "bells.safetensors": content}),
        "lab/none": Repo({"README.md": b"x"}),
        "lab/busy": Repo({"vinyl.safetensors": content}, status=429),
        "lab/refused": Repo({"vinyl.safetensors": content}, refused=("vinyl.safetensors",)),
        "lab/gated": Repo({"vinyl.safetensors": content}, gated=True, token="secret"),
    }
    with running_hub(repos) as hub, pointing_library_at(hub.url, tmp_path / "home"):
        for source in ("lab/one", "lab/two/a/vinyl.safetensors", "lab/two/bells.safetensors"):
            assert inspect_file(fetch_adapter(source), name="vinyl").sha256 == sha256
        fetched = len(hub.fetched)
        fetch_adapter("lab/one/vinyl.safetensors")
        assert len(hub.fetched) == fetched
        message = refusal("lab/two")
        assert "lab/two/a/vinyl.safetensors, lab/two/bells.safetensors" in message
        assert "has no .safetensors file" in refusal("lab/none")
        assert f"accept its terms at {hub.url}/lab/gated" in refusal("lab/gated/vinyl.safetensors")
        assert fetch_adapter("lab/gated/vinyl.safetensors", token="secret").read_bytes() == content
        assert "no repository lab/missing" in refusal("lab/missing")
        assert "429" in refusal("lab/busy", is_temporary=True)
        assert "403" in refusal("lab/refused")
        assert refusal("lab/refused") == refusal("lab/refused")  # without the id of the request, so it is logged once
        assert "larger than 10 bytes" in refusal("lab/one/vinyl.safetensors", max_bytes=10)
        for name in ("missing", "x" * 300, "\0"):
            # This hub closes the connection for an unknown file.
            assert "cannot be downloaded" in refusal(f"lab/one/{name}.safetensors", is_temporary=True)


@pytest.mark.server
def test_repositories_may_have_a_revision(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    repos = {"lab/one": Repo({"a/vinyl.safetensors": content}, revisions=("v1.0",))}
    with running_hub(repos) as hub, pointing_library_at(hub.url, tmp_path / "home"):
        for source in ("lab/one@v1.0", "lab/one@v1.0/a/vinyl.safetensors"):
            assert is_remote(source)
            assert fetch_adapter(source).read_bytes() == content
        assert "lab/one has no revision v2" in refusal("lab/one@v2")
        assert "lab/one has no revision v2" in refusal("lab/one@v2/a/vinyl.safetensors")
        assert "lab/one has no revision main" in refusal("lab/one")
    with pointing_library_at(hub.url, tmp_path / "home"):
        assert fetch_adapter("lab/one@v1.0/a/vinyl.safetensors").read_bytes() == content


@pytest.mark.server
def test_downloaded_files_are_used_while_the_hub_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    repos = {"lab/one": Repo({"vinyl.safetensors": content})}

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Task error: no route to host")  # as hf_xet does

    with running_hub(repos) as hub, pointing_library_at(hub.url, tmp_path / "home"):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.file_download.http_get", fail)
            assert "no route to host" in refusal("lab/one/vinyl.safetensors", is_temporary=True)
        fetch_adapter("lab/one/vinyl.safetensors")
    with pointing_library_at(hub.url, tmp_path / "home"):
        assert fetch_adapter("lab/one/vinyl.safetensors").read_bytes() == content
        for name in ("other", "../other"):
            message = refusal(f"lab/one/{name}.safetensors", is_temporary=name == "other")
            assert "cannot be downloaded" in message
            assert "rrno" not in message


def test_adapters_are_found_without_torch() -> None:
    code = "import sys; import stable_audio_serve.serving.adapters; print('torch' in sys.modules, 'ray' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == [b"False"] * 2
    )
