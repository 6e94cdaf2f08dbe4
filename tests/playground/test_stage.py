"""The stage of the playground page: progress and failures of jobs, and the view with ruler, zoom, region and beats."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from tests.patience import PATIENCE_S
from tests.playground.conftest import Page

pytestmark = pytest.mark.server

# Jobs stay at 42 % until `window.release()`.
WORKING = """
const real = window.fetch;
const released = new Promise((release) => (window.release = release));
window.fetch = async (url, options) => {
  if (!/jobs.[0-9a-f]+.events/.test(String(url))) return real(url, options);
  const data = { stage: "running", fraction: 0.42, eta_seconds: 3.2, queue_position: null };
  const first = new TextEncoder().encode(`id: 0\\nevent: progress\\ndata: ${JSON.stringify(data)}\\n\\n`);
  const start = async (stream) => {
    stream.enqueue(first);
    await released;
    stream.enqueue(new Uint8Array(await (await real(url, options)).arrayBuffer()));
    stream.close();
  };
  return new Response(new ReadableStream({ start }));
};
"""
FAILING = """
const real = window.fetch;
window.fetch = async (url, options) => {
  if (!/jobs.[0-9a-f]+.events/.test(String(url)) || window.isBack) return real(url, options);
  const data = { status: "failed", error: "The model ran out of memory." };
  return new Response(`id: end\\nevent: end\\ndata: ${JSON.stringify(data)}\\n\\n`);
};
"""


@pytest.fixture
def phone(page: Page) -> Iterator[Page]:
    """Yields the page on a small screen."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield page.open()
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def num_jobs(url: str, prompt: str) -> int:
    """Return the number of jobs on the server with this prompt."""
    jobs = httpx.get(f"{url}/jobs", params={"limit": 100}, timeout=PATIENCE_S).json()["jobs"]
    return sum(prompt in json.dumps(job) for job in jobs)


def place_of(page: Page, selector: str) -> dict[str, float]:
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    found: dict[str, float] = page.run(script, selector)
    return found


def drag(page: Page, start_s: float, end_s: float) -> None:
    """Drag over the waveform between two times of the clip, seconds."""
    view, room = place_of(page, ".track"), place_of(page, "#room-before")
    seconds = page.run("return Number(document.getElementById('playhead').ariaValueMax)")
    scale = (view["width"] - 2 * room["width"]) / seconds

    def x(time_s: float) -> int:
        return round(view["left"] + room["width"] + time_s * scale)

    actions = ActionChains(page.browser, duration=0)
    actions.w3c_actions.pointer_action.move_to_location(x(start_s), round(view["top"] + 80)).pointer_down()
    actions.w3c_actions.pointer_action.move_to_location(x(end_s), round(view["top"] + 80)).pointer_up()
    actions.perform()


def region_of(page: Page) -> tuple[float, float]:
    """Return the marked region, seconds."""
    page.until(lambda: page["region-tools"].is_displayed())
    start, end = (float(page[name].get_attribute("value") or "nan") for name in ("region-start", "region-end"))
    return start, end


def test_progress_is_shown_on_the_stage_in_sight_of_a_phone(phone: Page) -> None:
    phone.run(WORKING)
    phone.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    phone.until(lambda: phone.browser.find_elements(By.CSS_SELECTOR, "#stage progress[value]"))

    def is_in_sight() -> bool:
        bar = place_of(phone, "#stage progress")
        return bar["top"] >= 0 and bar["bottom"] <= phone.run("return innerHeight")

    phone.until(is_in_sight)
    assert "running, about 4 s left" in phone["jobs"].text
    assert phone.accessibility_problems() == []
    phone.run("window.release()")
    phone.until(lambda: phone.clips)


@pytest.mark.slow
def test_button_is_disabled_until_the_page_has_its_data(page: Page) -> None:
    script = """
        const real = window.fetch;
        const released = new Promise((release) => (window.release = release));
        window.fetch = async (url, options) => {
          if (String(url).endsWith("openapi.json")) await released;
          return real(url, options);
        };
    """
    added = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.open(is_ready=False)
        page.until(lambda: page["server-line"].text.startswith("ok") or page["generate"].text == "Connecting")
        assert not page["generate"].is_enabled()
        page["prompt"].send_keys("rain")
        page.run("document.getElementById('form').requestSubmit()")
        page.run("window.release()")
        page.until(lambda: page["generate"].is_enabled())
        assert page["generate"].text == "Generate"
        assert not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #form .error:not([hidden])")
    finally:
        page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


# Until `window.isBack` is true, requests that submit a job fail. The first one reaches the server, but its response is
# lost. The others do not reach the server.
AWAY = """
const real = window.fetch;
window.keys = [];
window.fetch = async (url, options) => {
  if (!String(url).endsWith("/jobs")) return real(url, options);
  window.keys.push(options.headers["Idempotency-Key"]);
  if (window.isBack) return real(url, options);
  if (window.keys.length === 1) await real(url, options);
  throw new TypeError("Failed to fetch");
};
"""
UNREACHED = AWAY.replace("if (window.keys.length === 1) await real(url, options);", "")


def test_order_is_sent_once_when_the_server_is_back(page: Page, served: str) -> None:
    page.run(AWAY)
    page.fill(prompt="a gong for a lost server", duration=0.5, steps=2).click("generate")
    page.until(lambda: "Sent when it is back." in page["jobs"].text)
    page.until(lambda: page.run("return keys.length") >= 3)
    page.run("window.isBack = true")
    page.until(lambda: page.clips)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    assert len(set(page.run("return keys"))) == 1
    assert num_jobs(served, "a gong for a lost server") == 1


@pytest.mark.slow
def test_order_can_be_cancelled_while_the_server_is_away(page: Page) -> None:
    page.run(UNREACHED)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "Sent when it is back." in page["jobs"].text)
    page.browser.find_element(By.CSS_SELECTOR, "#jobs button").click()
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    num_sent = page.run("window.isBack = true; return keys.length")
    page.open()
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #clips li")
    assert num_sent >= 1


FULL = """
const real = window.fetch;
window.fetch = async (url, options) => {
  if (!String(url).endsWith("/jobs") || window.isBack) return real(url, options);
  const headers = { "Retry-After": "2" };
  return new Response(JSON.stringify({ detail: "The server is full." }), { status: 429, headers });
};
"""


@pytest.mark.slow
def test_refused_order_stays_in_sight_of_a_phone_until_repeated(phone: Page) -> None:
    phone.run(FULL)
    phone.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    phone.until(lambda: "The server is full. Try again in 2 s." in phone["jobs"].text)

    def is_in_sight() -> bool:
        row = place_of(phone, "#jobs .failed")
        return row["top"] >= 0 and row["bottom"] <= phone.run("return innerHeight")

    phone.until(is_in_sight)
    phone.run("window.isBack = true")
    phone.browser.find_element(By.CSS_SELECTOR, "[aria-label='Try again rain']").click()
    phone.until(lambda: phone.clips)
    phone.open()
    assert not phone.browser.find_elements(By.CSS_SELECTOR, "#jobs li")
    assert len(phone.clips) == 1


@pytest.mark.slow
def test_order_waits_with_the_reason_of_a_full_server(page: Page) -> None:
    page.run(FULL.replace("429", "503").replace("full.", "full"))
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "The server is full. Try again in 2 s." in page["jobs"].text)
    page.run("window.isBack = true")
    page.until(lambda: page.clips)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_failed_job_stays_with_its_reason_and_is_repeated(scheme: str, page: Page) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.run(FAILING)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "The model ran out of memory." in page["jobs"].text)
    assert page.accessibility_problems() == []
    page.run("window.isBack = true")
    page.browser.find_element(By.CSS_SELECTOR, "[aria-label='Try again rain']").click()
    page.until(lambda: page.clips)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))


@pytest.mark.slow
def test_failed_job_can_be_dismissed(page: Page) -> None:
    page.run(FAILING)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs .failed"))
    page.browser.find_element(By.CSS_SELECTOR, "[aria-label='Dismiss rain']").click()
    page.open()
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #clips li")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_empty_and_working_page_is_accessible(scheme: str, page: Page) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open()
    page.run("for (const folded of document.querySelectorAll('details')) folded.open = true")
    assert page.accessibility_problems() == []
    page.run(WORKING)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]"))
    assert page.accessibility_problems() == []
    page.run("window.release()")
    page.until(lambda: page.clips)


@pytest.mark.slow
def test_view_zooms_around_the_playhead_and_follows_it(page: Page) -> None:
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    page.run("document.querySelector('h1').click()")
    assert place_of(page, ".track")["width"] == pytest.approx(place_of(page, "#wave")["width"], abs=3)
    for _ in range(6):
        ActionChains(page.browser).send_keys("+").perform()
    assert place_of(page, ".track")["width"] > 10 * place_of(page, "#wave")["width"]
    view, playhead = place_of(page, "#wave"), place_of(page, "#playhead")
    assert view["left"] <= playhead["left"] <= view["right"]
    page.click("play")
    page.until(lambda: page["play"].text == "Play")
    page.run("document.getElementById('wave').scrollLeft = 0")
    ActionChains(page.browser).send_keys("0").perform()
    assert place_of(page, ".track")["width"] == pytest.approx(place_of(page, "#wave")["width"], abs=3)


@pytest.mark.slow
def test_played_waveform_keeps_its_colour(page: Page) -> None:
    page.fill(prompt="rain", duration=1, steps=2).make_clip()
    picture = "return document.querySelector('#wave canvas').toDataURL()"
    page.until(lambda: page.run("return document.querySelector('#wave canvas').width > 100"))
    page.run("return new Promise((resume) => requestAnimationFrame(() => requestAnimationFrame(resume)))")
    before = page.run(picture)
    page.click("play")
    page.until(lambda: page["play"].text == "Pause")
    page.until(lambda: page["play"].text == "Play")
    assert page.run(picture) == before
    assert len(before) > 5000


@pytest.mark.slow
def test_region_covers_the_spectrogram_and_the_room_is_labelled(page: Page) -> None:
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    assert [page["room-before"].text, page["room-after"].text] == ["Extend", "Extend"]
    page.click("mark-region")
    region, canvas = place_of(page, "#region"), place_of(page, "#wave canvas")
    assert region["bottom"] == pytest.approx(canvas["bottom"], abs=1)
    assert region["top"] < canvas["top"] + 30
    page.click("extend-after")
    assert region_of(page) == (2, 3)
    assert (
        page.run(
            "const { scrollWidth, clientWidth } = document.getElementById('wave'); return scrollWidth - clientWidth"
        )
        == 0
    )
    page.click("extend-before")
    assert region_of(page) == (-1, 0)
    assert page.make_clip("regenerate")["bytes"] == 3 * 44100 * 4


@pytest.mark.slow
def test_region_snaps_to_beats_where_the_tempo_is_known(page: Page) -> None:
    page.fill(prompt="house drums at 120 bpm", duration=4, steps=2).make_clip()
    drag(page, 0.6, 2.9)
    assert region_of(page) == (0.5, 3)
    drag(page, 1.5, 1.9)  # moves the region
    assert region_of(page) == (1, 3.5)
    page.click("snap")
    drag(page, 3.5, 2.9)  # moves its end
    assert region_of(page)[1] not in (2.5, 3)
    page.click("region-clear")
    page.fill(prompt="rain").make_clip()
    assert not page["snap"].is_displayed()


@pytest.mark.slow
def test_click_moves_the_playhead(page: Page) -> None:
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    drag(page, 1.2, 1.2)
    page.until(lambda: page["clock"].text.startswith("0:01.2"))
    assert not page["region-tools"].is_displayed()


@pytest.mark.slow
def test_times_are_shown_in_minutes_and_seconds(page: Page) -> None:
    script = """
        const [values, done] = arguments;
        import("./playground/words.js").then(({ formatTime }) => done(values.map((each) => formatTime(...each))));
    """
    values = [[0, 1], [4.25], [59.999], [75, 15], [0.5, 0.5], [-1, 1], [1800, 300], [-0.001]]
    shown = page.browser.execute_async_script(script, values)
    assert shown == ["0:00", "0:04.25", "1:00.00", "1:15", "0:00.5", "−0:01", "30:00", "0:00.00"]


@pytest.mark.slow
def test_volume_is_kept(page: Page) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.run("arguments[0].value = 0.25; arguments[0].dispatchEvent(new Event('input'))", page["volume"])
    page.open()
    assert page["volume"].get_attribute("value") == "0.25"
    page.browser.find_element(By.CSS_SELECTOR, "#clips .what").click()
    page.click("play")
    gain = page.browser.execute_async_script(
        "const [done] = arguments; import('./playground/audio.js').then(({ output }) => done(output().gain.value))"
    )
    assert gain == 0.25


def touch(page: Page, *events: tuple[str, float | None], height: float) -> None:
    """Touch the view. Events are (type, CSS pixels from its left edge, or None without a finger)."""
    view = place_of(page, "#wave")
    for kind, x in events:
        points = [] if x is None else [{"x": view["left"] + x, "y": view["top"] + height}]
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.slow
def test_zoomed_view_is_scrolled_by_touch_on_its_ruler(phone: Page) -> None:
    phone.fill(prompt="rain", duration=2, steps=2).make_clip()
    for _ in range(4):
        phone.click("zoom-in")
    phone.run("document.getElementById('stage').scrollIntoView({behavior: 'instant'})")

    def swipe(height: float) -> float:
        phone.run("document.getElementById('wave').scrollLeft = 200")
        touch(phone, ("touchStart", 250), ("touchMove", 200), ("touchMove", 100), ("touchEnd", None), height=height)
        return float(phone.run("return document.getElementById('wave').scrollLeft"))

    assert swipe(12) == 350
    assert not phone["region-tools"].is_displayed()
    assert swipe(100) == 200
    phone.until(lambda: phone["region-tools"].is_displayed())


@pytest.mark.slow
def test_drag_after_a_cancelled_press_leaves_the_playhead(phone: Page) -> None:
    phone.fill(prompt="rain", duration=2, steps=2).make_clip()
    phone.run("document.getElementById('stage').scrollIntoView({behavior: 'instant'})")
    touch(phone, ("touchStart", 150), ("touchCancel", None), height=100)
    touch(phone, ("touchStart", 150), ("touchMove", 200), ("touchMove", 250), ("touchEnd", None), height=100)
    phone.until(lambda: phone["region-tools"].is_displayed())
    assert phone["clock"].text == "0:00.00 / 0:02.00"
