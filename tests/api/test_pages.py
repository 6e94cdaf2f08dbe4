"""What a browser is shown: the page at the root and the API's pages, none of which loads anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue
from tests.backends import ToneBackend

BASE = "http://localhost"


class Page(HTMLParser):
    """What a page loads by itself, where its links go, and its inline scripts and styles."""

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
async def test_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path)
    page, policy = Page(reply.text), policy_of(reply)
    assert reply.headers["content-type"].startswith("text/html")
    assert policy["default-src"] == ["'none'"]
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


async def test_assets_are_the_packages_files_and_no_others(client: httpx.AsyncClient) -> None:
    scripts = [url for url in Page((await client.get("/docs")).text).loads if url.endswith(".js")]
    reply = await client.get(scripts[0])
    assert reply.headers["content-type"].startswith(("text/javascript", "application/javascript"))
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert len(reply.content) > 500_000
    folder = scripts[0].rpartition("/")[0]
    for name in ("nope.js", "..%2f__init__.py", "%2e%2e/__init__.py", "..%5c__init__.py", "core.py"):
        assert (await client.get(f"{folder}/{name}")).status_code == 404, name


async def test_the_root_says_what_is_served_and_where(client: httpx.AsyncClient) -> None:
    reply = await client.get("/")
    page = Page(reply.text)
    for name in ("small-sfx", "small-music", "medium", "demo"):
        assert name in reply.text
    for prefix in ("/sa3", "/saos", "/vllm/v1", "/aiml/v2", "/fal"):
        assert f"{BASE}{prefix}" in reply.text
    assert {"/docs", "/redoc", "/openapi.json", "/health", "/ready", "/v1/models"} <= {
        urlsplit(url).path for url in page.links
    }
    for url in page.links:
        if urlsplit(urljoin(BASE, url)).netloc == "test":
            assert (await client.get(url)).status_code == 200, url
    command = re.search(r"curl [^<]+", reply.text)
    assert command is not None
    assert f"{BASE}/v1/audio/generations" in command[0]


async def test_programs_get_the_same_as_json(client: httpx.AsyncClient) -> None:
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
    told = await client.head("/")
    assert (told.status_code, told.content) == (200, b"")


async def test_names_of_models_cannot_become_markup(jobs: JobQueue) -> None:
    card = ModelCard("<b>x</b>", "x", description="<script>alert(1)</script>", max_duration_s=1.0)
    app = create_app(ToneBackend(ModelCatalog([card])), Settings(), jobs=jobs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        text = (await client.get("/", headers={"X-Forwarded-Host": 'a"><script>alert(2)</script>'})).text
    assert "<b>" not in text
    assert "<script" not in text


async def test_with_keys_the_root_stays_open_and_the_apis_pages_do_not(jobs: JobQueue) -> None:
    settings = Settings.model_validate({"api": {"key_hashes": [hash_key("secret")]}})
    app = create_app(ToneBackend(), settings, jobs=jobs)
    asset = "/docs/assets/swagger-ui-bundle.js"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "Authorization: Bearer" in page.text
        for path in ("/docs", "/redoc", "/openapi.json", asset):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_pages_work_below_the_path_of_an_application(jobs: JobQueue) -> None:
    app = create_app(ToneBackend(), Settings(), jobs=jobs)
    transport = httpx.ASGITransport(app, root_path="/audio")
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for path in ("/audio/docs", "/audio/redoc"):
            page = Page((await client.get(path)).text)
            assert page.loads
            assert all(url.startswith(("/audio/", "data:")) for url in page.loads)
        card = (await client.get("/audio/", headers={"Accept": "application/json"})).json()
        assert card["links"]["health"] == f"{BASE}/audio/health"


@pytest.mark.parametrize("key", [None, "secret"])
async def test_the_root_says_which_links_need_a_key(jobs: JobQueue, key: str | None) -> None:
    hashes = [hash_key(key)] if key else []
    app = create_app(ToneBackend(), Settings.model_validate({"api": {"key_hashes": hashes}}), jobs=jobs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        text = (await client.get("/")).text
        for path, name in re.findall(rf'<a href="{BASE}([^"]+)">([^<]+)</a>', text):
            assert ("(needs a key)" in name) == ((await client.get(path)).status_code == 401), path
    assert text.count("(needs a key)") == (4 if key else 0)
