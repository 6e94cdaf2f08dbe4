"""Run the playground page in Chromium, with a server in this process that has the demo model."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.api.compat.serving import serve_app
from tests.packages import install_npm
from tests.patience import PATIENCE_S

AXE = "axe-core@4.14.1"
MODELS = [{"name": "demo", "threads": 1, "engine": {"warmup_budget_s": 0}}]


@asynccontextmanager
async def _serve_demo(**settings: Any) -> Any:
    chosen = Settings.model_validate({"models": MODELS})
    engines = {model.name: load_engine(chosen, model) for model in chosen.models}
    async with (
        LocalBackend(plan_deployments(chosen).catalog, engines) as backend,
        serve_app(backend, models=MODELS, **settings) as (port, _),  # type: ignore[arg-type]
    ):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def in_a_thread(make: Callable[[], AbstractAsyncContextManager[str]]) -> Iterator[str]:
    """Enter an async context in another thread with its own event loop, because Selenium's calls block this thread.

    Yields the value that the async context yields.
    """
    url: list[str] = []
    is_up, is_over = threading.Event(), threading.Event()

    async def run() -> None:
        async with make() as found:
            url.append(found)
            is_up.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert is_up.wait(PATIENCE_S)
        yield url[0]
    finally:
        is_over.set()
        thread.join()


@pytest.fixture(scope="package")
def served() -> Iterator[str]:
    with in_a_thread(_serve_demo) as url:
        yield url


@contextmanager
def serve(**settings: Any) -> Iterator[str]:
    with in_a_thread(lambda: _serve_demo(**settings)) as url:
        yield url


@pytest.fixture(scope="package")
def chromium() -> Iterator[webdriver.Chrome]:
    browser, driver_path = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver_path is None:
        packages = "Debian and Ubuntu: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs Chromium and its driver ({packages})")
        pytest.skip(f"NOT TESTED IN A BROWSER: there is no Chromium, or no driver of it ({packages})")
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,1200"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = browser
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    driver.set_script_timeout(PATIENCE_S)
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    yield driver
    driver.quit()


@dataclass
class Page:
    """The playground page in the browser, with methods to use and read it."""

    browser: webdriver.Chrome
    url: str

    def open(self, *, is_ready: bool = True) -> Page:
        self.browser.get(self.url)
        if is_ready:
            self.until(lambda: self.run("return document.documentElement.dataset.ready"))
        return self

    def __getitem__(self, name: str) -> WebElement:
        """Returns the element with this id."""
        return self.browser.find_element(By.ID, name)

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())

    def fill(self, **fields: object) -> Page:
        for name, value in fields.items():
            self.unfold(name)
            if self[name].tag_name == "select":
                Select(self[name]).select_by_value(str(value))
            else:
                self.run("arguments[0].value = ''", self[name])
                self[name].send_keys(str(value))
        return self

    def unfold(self, name: str) -> None:
        """Open the collapsed part of the page (`details`) that contains the element `name`."""
        self.run("arguments[0].closest('details')?.setAttribute('open', '')", self[name])

    def click(self, name: str) -> None:
        self.until(lambda: self[name].is_enabled())
        self.unfold(name)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self[name])
        self[name].click()

    @property
    def shown(self) -> str | None:
        return self.run("return document.documentElement.dataset.shown ?? null")

    def make_clip(self, button: str = "generate") -> dict[str, Any]:
        """Press a button that generates audio, and wait for the clip. Returns the stored clip, without its audio."""
        before = self.shown
        self.click(button)
        self.until(lambda: self.shown not in (None, before))
        self.until(lambda: any(clip["id"] == self.shown for clip in self.clips))
        return next(clip for clip in self.clips if clip["id"] == self.shown)

    @property
    def clips(self) -> list[dict[str, Any]]:
        """Returns the clips that the browser has stored, oldest first."""
        return self.browser.execute_async_script(
            """
            const [done] = arguments;
            const open = indexedDB.open("stable-audio-serve");
            open.onsuccess = () => {
              const all = open.result.transaction("takes").objectStore("takes").getAll();
              all.onsuccess = async () => {
                open.result.close();
                const sizes = {};
                for (const clip of all.result) {
                  // The size of the samples only, because a recipe may follow them.
                  sizes[clip.id] = new DataView(await clip.blob.slice(0, 44).arrayBuffer()).getUint32(40, true);
                }
                done(all.result.sort((one, other) => one.at - other.at).map((clip) => ({
                  ...clip, blob: null, bytes: sizes[clip.id], order: { ...clip.order, source: clip.order.source?.size },
                })));
              };
            };
            """
        )

    @property
    def status_text(self) -> str:
        return self["said"].text

    def field_errors(self) -> dict[str, str]:
        """Returns the error messages that the page shows, by the name of the form field."""
        notes = self.browser.find_elements(By.CSS_SELECTOR, "[data-field] .error")
        return {note.get_attribute("id").removeprefix("error-"): note.text for note in notes}

    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    @cached_property
    def _axe(self) -> str:
        return (install_npm(AXE) / "axe-core" / "axe.min.js").read_text()

    def accessibility_problems(self) -> list[str]:
        """Returns the accessibility problems that the checker axe finds."""
        self.run(self._axe)
        found = self.browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        return [f"{entry['id']}: {node['html'][:120]}" for entry in found for node in entry["nodes"]]


@pytest.fixture
def page(chromium: webdriver.Chrome, served: str) -> Iterator[Page]:
    """Yields the opened page, with empty browser storage.

    At the end, the test fails if the browser's console has messages.
    """
    page = Page(chromium, served)
    chromium.get("about:blank")
    cleared = {"origin": served, "storageTypes": "indexeddb,local_storage"}
    chromium.execute_cdp_cmd("Storage.clearDataForOrigin", cleared)
    source = "sessionStorage.clear(); localStorage.setItem('stable-audio-serve.autoplay', 'off')"
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    page.messages()
    page.open()
    chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    yield page
    assert page.messages() == []
