"""The page at the root and the API pages, none of which loads anything from other hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue
from tests.backends import ToneBackend

BASE = "http://localhost"
PLAYGROUND = Path(__file__).parents[2] / "stable_audio_serve" / "api" / "playground"


class Page(HTMLParser):
    """The resources, links, inline scripts and inline styles of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.inline: dict[str, list[tuple[dict[str, str | None], str]]] = {"script": [], "style": []}
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._inside = (tag, values) if tag in self.inline and "src" not in values else None
        for name in ("src", "href", "spec-url"):
            if url := values.get(name):
                (self.links if tag == "a" else self.loads).append(url)

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.inline[self._inside[0]].append((self._inside[1], data))
            self._inside = None


def policy_of(reply: httpx.Response) -> dict[str, list[str]]:
    directives = [part.split() for part in reply.headers["content-security-policy"].split(";")]
    return {name: sources for name, *sources in directives}


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc"])
async def test_pages_load_nothing_from_other_hosts(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path)
    page, policy = Page(reply.text), policy_of(reply)
    assert reply.headers["content-type"].startswith("text/html")
    assert policy["default-src"] == (["'self'"] if path == "/" else ["'none'"])
    assert not any("*" in source or "http" in source for sources in policy.values() for source in sources)
    assert "'unsafe-inline'" not in policy.get("script-src", [])
    for url in page.loads:
        assert urlsplit(urljoin(BASE, url)).netloc in ("localhost", "")
        if not url.startswith("data:"):
            assert (await client.get(url)).status_code == 200, url
    for attributes, _ in page.inline["script"]:
        assert f"'nonce-{attributes['nonce']}'" in policy["script-src"]
    for attributes, text in page.inline["style"]:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed = {f"'sha256-{digest}'", f"'nonce-{attributes.get('nonce')}'", "'unsafe-inline'"}
        assert allowed & set(policy["style-src"])


async def test_nonces_are_used_once(client: httpx.AsyncClient) -> None:
    first, second = [policy_of(await client.get("/docs"))["script-src"] for _ in range(2)]
    assert first != second


async def test_assets_are_the_packages_files_only(client: httpx.AsyncClient) -> None:
    scripts = [url for url in Page((await client.get("/docs")).text).loads if url.endswith(".js")]
    reply = await client.get(scripts[0])
    assert reply.headers["content-type"].startswith(("text/javascript", "application/javascript"))
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert len(reply.content) > 500_000
    folder = scripts[0].rpartition("/")[0]
    for name in ("nope.js", "..%2f__init__.py", "%2e%2e/__init__.py", "..%5c__init__.py", "core.py"):
        assert (await client.get(f"{folder}/{name}")).status_code == 404, name


async def test_root_page_runs_only_its_own_scripts_and_styles(client: httpx.AsyncClient) -> None:
    first, second = [await client.get("/") for _ in range(2)]
    policy = policy_of(first)
    assert policy == {
        "default-src": ["'self'"],
        "script-src": policy["script-src"],
        **{name: ["'none'"] for name in ("worker-src", "object-src", "base-uri", "form-action", "frame-ancestors")},
    }
    assert policy_of(second)["script-src"] != policy["script-src"]
    page = Page(first.text)
    (script,) = re.findall(r"<script [^>]*nonce=\"([^\"]+)\"[^>]*src=\"playground/main.js\"", first.text)
    assert policy["script-src"] == [f"'nonce-{script}'"]  # 'self' would allow scripts in files that clients uploaded
    assert (page.inline["script"], page.inline["style"]) == ([], [])
    assert not re.search(r"\s(on[a-z]+|style)=", first.text)


async def test_playground_serves_its_files_only(client: httpx.AsyncClient) -> None:
    names = {path.relative_to(PLAYGROUND).as_posix() for path in PLAYGROUND.rglob("*.*") if path.is_file()}
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for name in names:
        reply = await client.get(f"/playground/{name}")
        kind = types.get(Path(name).suffix)
        assert reply.status_code == (200 if kind else 404), name
        if kind:
            assert reply.headers["content-type"].startswith(kind)
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.content == (PLAYGROUND / name).read_bytes()
            held = {"If-None-Match": reply.headers["etag"]}
            assert (await client.get(f"/playground/{name}", headers=held)).status_code == 304
    for name in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py", "..%5capp.py", "vendor", "vendor/", ""):
        assert (await client.get(f"/playground/{name}")).status_code == 404, name


async def test_json_clients_get_a_summary(client: httpx.AsyncClient) -> None:
    reply = await client.get("/", headers={"Accept": "application/json"})
    body = reply.json()
    assert body["name"] == "stable-audio-serve"
    assert (body["status"], body["ready"]) == ("ok", True)
    assert [model["name"] for model in body["models"]] == ["small-sfx", "small-music", "medium", "demo"]
    assert body["models"][0]["is_default"]
    assert body["links"]["health"] == f"{BASE}/health"
    assert body["dialects"]["vllm"] == {
        "name": "vLLM-Omni",
        "base_url": f"{BASE}/v1",
        "own_base_url": f"{BASE}/vllm/v1",
    }
    assert "accept" in reply.headers["vary"].lower()
    for accept in ("*/*", "text/html,application/xhtml+xml,application/json;q=0.9"):
        assert (await client.get("/", headers={"Accept": accept})).headers["content-type"].startswith("text/html")
    head = await client.head("/")
    assert (head.status_code, head.content) == (200, b"")


async def test_scripts_of_the_pages_load_from_no_other_host(client: httpx.AsyncClient) -> None:
    for page in ("/docs", "/redoc"):
        for url in Page((await client.get(page)).text).loads:
            if url.endswith((".js", ".css")):
                text = (await client.get(url)).text
                assert not re.search(r"""(\bsrc\s*[:=]\s*["']|@import\s*["']|url\(["']?)https?://""", text), url


async def test_with_keys_pages_are_public_and_the_api_is_not(jobs: JobQueue) -> None:
    settings = Settings.model_validate({"api": {"key_hashes": [hash_key("secret")]}})
    app = create_app(ToneBackend(), settings, jobs=jobs)
    asset = "/docs/assets/swagger-ui-bundle.js"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        for path in ("/", "/playground/main.js", "/docs", "/redoc", "/openapi.json", asset):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/v1/models")).status_code == 401


async def test_pages_work_below_a_mount_path(jobs: JobQueue) -> None:
    app = create_app(ToneBackend(), Settings(), jobs=jobs)
    transport = httpx.ASGITransport(app, root_path="/audio")
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for path in ("/audio/", "/audio/docs", "/audio/redoc"):
            page = Page((await client.get(path)).text)
            loads = [url if url.startswith("data:") else urljoin(path, url) for url in page.loads]
            assert loads
            assert all(url.startswith(("/audio/", "data:")) for url in loads)
        card = (await client.get("/audio/", headers={"Accept": "application/json"})).json()
        assert card["links"]["health"] == f"{BASE}/audio/health"
        assert (await client.get("/audio/openapi.json")).json()["servers"] == [{"url": "/audio"}]
        assert urljoin("/audio", (await client.get("/audio")).headers["location"]) == "/audio/"


async def test_api_pages_work_if_a_proxy_removes_a_prefix(jobs: JobQueue) -> None:
    app = create_app(ToneBackend(), Settings.model_validate({"api": {"public_url": "https://a.test/audio"}}), jobs=jobs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        for path in ("/docs", "/redoc"):
            assert not re.search(r"""["']/\w""", (await client.get(path)).text), path
        assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "/audio"}]


async def test_llms_txt_lists_models_and_operations(client: httpx.AsyncClient) -> None:
    reply = await client.get("/llms.txt")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    lines = reply.text.splitlines()
    assert lines[0] == "# stable-audio-serve"
    assert lines[2].startswith("> ")
    document = (await client.get("/openapi.json")).json()
    sections = {line.removeprefix("## ") for line in lines if line.startswith("## ")}
    assert {tag["name"] for tag in document["tags"]} - sections == {"Pages", "Operators"}
    assert "`small-sfx` (up to 120 s)" in reply.text
    for path in ("/v1/audio/generations", "/jobs", "/v1/sound-generation", "/v2beta/audio/stable-audio/inpaint"):
        (line,) = [line for line in lines if line.startswith(f"- [POST {path}](http://localhost/docs#/")]
        assert not line.endswith(": ")
