"""The playground page as a whole: accessibility, keyboard, narrow screens and the files that it loads."""

from __future__ import annotations

import io
import os
from pathlib import Path

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.playground.conftest import Page

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2] / "stable_audio_serve" / "api" / "playground"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(scheme: str, page: Page) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open().fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.click("mark-region")
    assert page.accessibility_problems() == []


def test_page_fits_a_narrow_screen_and_works_by_keyboard(page: Page) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.open()
        fields = page.browser.find_elements(By.CSS_SELECTOR, "input, select, textarea")
        assert {field.value_of_css_property("font-size") for field in fields} == {"16px"}
        page["prompt"].send_keys("rain", Keys.TAB)
        page.run("document.getElementById('source-file').focus()")
        assert page.run("return getComputedStyle(document.querySelector('.button')).outlineStyle") == "solid"
        before = page.shown
        page.fill(duration=0.5, steps=2)
        page["steps"].send_keys(Keys.CONTROL, Keys.ENTER)
        page.until(lambda: page.shown not in (None, before))
        page.click("mark-region")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        script = """
            const all = [...document.querySelectorAll("button, input, select, textarea")];
            const isOut = (each) => each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 1;
            return all.filter(isOut).map((each) => each.outerHTML);
        """
        assert page.run(script) == []
        script = """
            const top = () => document.querySelector(".submit").getBoundingClientRect().top;
            const isCovered = (field) => (field.focus(), field.getBoundingClientRect().bottom > top());
            document.documentElement.style.scrollBehavior = "auto";
            const all = [...document.querySelectorAll("#form :is(input, select, summary)")];
            return all.filter((each) => each.checkVisibility() && isCovered(each)).map((each) => each.outerHTML);
        """
        assert page.run(script) == []
        assert page.accessibility_problems() == []
        page.make_clip("regenerate")
        row = page.browser.find_element(By.CSS_SELECTOR, "#clips small")
        assert "from rain, seed" in row.text
        assert page.run("return arguments[0].scrollWidth <= arguments[0].clientWidth", row)
    finally:
        page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_shortcuts_work_outside_text_fields(page: Page) -> None:
    def press(key: str) -> None:
        ActionChains(page.browser).send_keys(key).perform()

    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    press(" ")  # the page itself receives the key, because no element has the focus
    page.until(lambda: page["play"].text == "Pause")
    press(" ")
    page.until(lambda: page["play"].text == "Play")
    assert len(page.clips) == 1
    page.fill(prompt="wind").make_clip()
    page.run("document.getElementById('download').focus()")
    press("l")
    page.until(lambda: page["loop"].get_attribute("aria-pressed") == "true")
    press("b")
    page.until(lambda: page["ab"].get_attribute("aria-pressed") == "true")
    press(Keys.ARROW_RIGHT)
    page.until(lambda: page["clock"].text == "0:01.00 / 0:02.00")


@pytest.mark.slow
def test_shortcuts_are_listed_on_the_page(page: Page) -> None:
    page.click("shortcuts")
    page.run("document.getElementById('shortcuts').open = true")
    listed = [key.text for key in page.browser.find_elements(By.CSS_SELECTOR, "#shortcuts kbd")]
    assert listed == ["Ctrl + Enter", "Space", "L", "B", "←", "→", "Home", "+", "−", "0", "R", "Esc"]
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    page.run("document.activeElement.blur()")
    ActionChains(page.browser).send_keys("r").perform()
    page.until(lambda: page["region-tools"].is_displayed())
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.until(lambda: not page["region-tools"].is_displayed())
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT, Keys.HOME).perform()
    page.until(lambda: page["clock"].text == "0:00.00 / 0:02.00")


@pytest.mark.slow
def test_page_is_painted_within_a_second(page: Page) -> None:
    page.browser.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    try:
        page.open()
        script = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
        (painted_ms,) = page.until(lambda: page.run(script))
        loaded = "return performance.getEntriesByType('resource').map((entry) => [entry.name, entry.encodedBodySize])"
        sizes = {name: size for name, size in page.run(loaded) if "/playground/" in name}
    finally:
        page.browser.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": False})
    assert painted_ms < 1000
    assert len(sizes) > 10
    assert sum(sizes.values()) < 300_000


@pytest.mark.slow
def test_page_does_not_move_for_users_who_prefer_that(page: Page) -> None:
    script = "return getComputedStyle(document.documentElement).scrollBehavior"
    for preference, behaviour in (("no-preference", "smooth"), ("reduce", "auto")):
        features = [{"name": "prefers-reduced-motion", "value": preference}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert page.run(script) == behaviour
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_selected_state_is_visible_in_forced_colours(page: Page) -> None:
    features = [{"name": "forced-colors", "value": "active"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    background = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    page.click("seed-lock")
    for selected in ("#seed-lock", ".kinds :checked + span"):
        assert page.run(background, selected) != page.run(background, "body")
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_prompt_in_a_language_from_right_to_left_is_shown_so(page: Page) -> None:
    page.fill(prompt="صوت المطر, 4 bpm!", duration=0.5, steps=2).make_clip()
    direction = "return getComputedStyle(document.querySelector(arguments[0])).direction"
    for place in ("#prompt", "#clip-name", "#clips .what span"):
        assert page.run(direction, place) == "rtl"


@pytest.mark.slow
def test_page_loads_only_small_local_files(page: Page, served: str) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith((served, "blob:")) for name in loaded)
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 300_000
    headers = httpx.get(served, headers={"Accept": "text/html"}).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    part = httpx.get(f"{served}/playground/main.js")
    assert part.headers["content-type"].startswith("text/javascript")
    fresh = {"If-None-Match": part.headers["etag"]}
    assert httpx.get(f"{served}/playground/main.js", headers=fresh).status_code == 304
    for path in ("nothing.js", "../pages.py", "index.html", "x/../../app.py"):
        assert httpx.get(f"{served}/playground/{path}").status_code == 404
    assert httpx.get(served, headers={"Accept": "application/json"}).json()["name"] == "stable-audio-serve"


@pytest.mark.parametrize(
    ("name", "scheme", "width"), [("light", "light", 1300), ("dark", "dark", 1300), ("phone", "light", 360)]
)
@pytest.mark.slow
def test_screenshots_for_the_documentation(name: str, scheme: str, *, width: int, page: Page, tmp_path: Path) -> None:
    """The screenshots are taken in every run, but written to docs/images only with UPDATE_PICTURES=1."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open()
        for prompt, seed in (("a 440 Hz sine tone", 1), ("house drum loop at 120 bpm", 7)):
            page.fill(prompt=prompt, duration=4, steps=8, seed=seed).make_clip()
        page.click("mark-region")
        page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#server-models td"))
        top = "#stage" if name == "phone" else "header"
        page.run("document.querySelector(arguments[0]).scrollIntoView({ behavior: 'instant' })", top)
        page.run("document.activeElement.blur()")
        shot = Image.open(io.BytesIO(page.browser.get_screenshot_as_png())).convert("RGB").quantize(128)
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    folder = ROOT.parents[2] / "docs" / "images" if os.environ.get("UPDATE_PICTURES") else tmp_path
    folder.mkdir(exist_ok=True)
    picture = folder / f"playground-{name}.png"
    shot.save(picture, optimize=True)
    assert shot.size == (width, 900)
    assert 5_000 < picture.stat().st_size < 150_000
