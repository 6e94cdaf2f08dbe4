"""The playground in a browser on the server's own two cores: from the click on Generate to the first sample of a take
of 4 seconds by the demo model, which is played as soon as it is there, and from opening the page to its first paint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.cases.engine import resolve_model
from benchmarks.servers.process import running_server, write_config
from benchmarks.settings import CaseSettings

_TAKES = 10
_DURATION_S = 4
_TIMEOUT_S = 120.0
_BROWSER, _DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"  # as Debian installs them
_ARGUMENTS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,1000")

# The button says Pause from the moment on at which the take's samples are given to the sound device.
_CLICK = """
const [done] = arguments;
const play = document.getElementById("play");
if (play.textContent === "Pause") play.click();
let clicked;
new MutationObserver((changes, observer) => {
  if (play.textContent !== "Pause") return;
  observer.disconnect();
  done(performance.now() - clicked);
}).observe(play, { childList: true });
clicked = performance.now();
document.getElementById("generate").click();
"""


def run_playground_case(settings: CaseSettings) -> dict[str, Any]:
    """One server, one browser; the first take is not counted: it starts the sound device."""
    entry = resolve_model(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), entry, threads=settings.threads)
        with running_server(config) as server, _browser() as browser:
            paints_ms = [_open(browser, server.url) for _ in range(settings.rounds)]
            for name, value in (("prompt", "house drum loop at 120 bpm"), ("duration", str(_DURATION_S))):
                field = browser.find_element(By.ID, name)
                field.clear()
                field.send_keys(value)
            browser.find_element(By.ID, "generate").click()  # a person's click, without which no sound may start
            _until(browser, "return document.getElementById('play').textContent === 'Pause'")
            takes_ms = [float(browser.execute_async_script(_CLICK)) for _ in range(_TAKES)]
    return {
        "takes_ms": takes_ms,
        "click_to_first_sample_ms": median(takes_ms),
        "slowest_take_ms": max(takes_ms),
        "first_paints_ms": paints_ms,
        "first_paint_ms": max(paints_ms),
    }


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """The median of the takes, the slowest of them, the slowest first paint."""
    return [
        {
            "takes": len(results["takes_ms"]),
            "click_to_first_sample_ms": results["click_to_first_sample_ms"],
            "slowest_take_ms": results["slowest_take_ms"],
            "first_paint_ms": results["first_paint_ms"],
        }
    ]


@contextmanager
def _browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in _ARGUMENTS:
        options.add_argument(f"--{argument}")
    options.binary_location = _BROWSER
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    driver.set_script_timeout(_TIMEOUT_S)
    try:
        yield driver
    finally:
        driver.quit()


def _open(browser: webdriver.Chrome, url: str) -> float:
    """Open the page as nobody did before. Returns the time to its first paint, ms."""
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.get(f"{url}/")
    _until(browser, "return document.documentElement.dataset.ready")
    script = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    return float(browser.execute_script(script))


def _until(browser: webdriver.Chrome, script: str) -> None:
    WebDriverWait(browser, _TIMEOUT_S, poll_frequency=0.05).until(lambda driver: driver.execute_script(script))
