"""Adapters on the playground page: sliders, what the page sends, and clips that were made with adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.playground.conftest import Page

pytestmark = pytest.mark.server

# Changes the server's responses: adds adapters to the list of models, and the field `loras` to the API description.
# Also moves the adapters of each request to `window.sent`, because the server has no files of these adapters.
ADAPTERS = """
const realFetch = window.fetch;
const changes = {
  "/v1/models": (body) => body.data.push(
    { id: "demo:vinyl", parent: "demo", type: "dora-rows", rank: 16 },
    { id: "demo:tape", parent: "demo", type: "lora", rank: 8 },
    { id: "other:bells", parent: "other", type: "lora", rank: 8 },
  ),
  "/openapi.json": ({ components }) => {
    for (const [name, schema] of Object.entries(components.schemas)) {
      if (/Generation|Job|Variation/.test(name)) schema.properties.loras = { type: "array", description: "Adapters." };
    }
  },
};
window.fetch = async (address, options = {}) => {
  const { pathname } = new URL(address);
  let { body } = options;
  if (body instanceof FormData && pathname.startsWith("/jobs")) {
    window.sent = JSON.parse(body.get("loras"));
    body.delete("loras");
  } else if (typeof body === "string") {
    const { loras, ...fields } = JSON.parse(body);
    window.sent = loras ?? null;
    body = JSON.stringify(fields);
  }
  const reply = await realFetch(address, { ...options, body });
  if (!changes[pathname] || window.hidesAdapters) return reply;
  const changed = await reply.json();
  changes[pathname](changed);
  return new Response(JSON.stringify(changed), { headers: reply.headers });
};
"""


@pytest.fixture
def adapted(page: Page) -> Iterator[Page]:
    """Yields the page of a server whose demo model has the adapters vinyl and tape."""
    added = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": ADAPTERS})
    yield page.open()
    page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def strengths(page: Page) -> dict[str, str]:
    """Returns the shown strengths of the adapters that the page has sliders for."""
    script = """
        const shown = [...document.querySelectorAll("#loras input")].filter((slider) => slider.checkVisibility());
        return Object.fromEntries(shown.map(({ labels: [label] }) => label.textContent.trim().split(" ")));
    """
    found: dict[str, str] = page.run(script)
    return found


def move(page: Page, name: str, strength: float) -> None:
    """Set the slider of an adapter, and send the event that follows when a user drags it."""
    script = """
        const [name, strength] = arguments;
        const sliders = [...document.querySelectorAll("#loras input")];
        const slider = sliders.find(({ labels: [label] }) => label.textContent.startsWith(`${name} `));
        slider.value = strength;
        slider.dispatchEvent(new Event("input", { bubbles: true }));
    """
    page.run(script, name, strength)


def test_sliders_are_labelled_bounded_and_off(adapted: Page) -> None:
    assert strengths(adapted) == {"vinyl": "off", "tape": "off"}
    sliders = [adapted["lora-0"], adapted["lora-1"]]
    names = [slider.accessible_name.strip() for slider in sliders]  # Chromium 150 keeps the space before the strength
    assert names == ["vinyl", "tape"]
    bounds = [[slider.get_attribute(name) for name in ("min", "max", "step", "value")] for slider in sliders]
    assert bounds == [["0", "2", "0.05", "0"], ["-2", "2", "0.05", "0"]]
    sliders[0].send_keys(Keys.ARROW_RIGHT)
    assert strengths(adapted) == {"vinyl": "0.05", "tape": "off"}
    assert [slider.get_attribute("aria-valuetext") for slider in sliders] == ["0.05", "off"]
    assert adapted.accessibility_problems() == []
    models = adapted.browser.find_elements(By.CSS_SELECTOR, "#model option")
    assert [model.get_attribute("value") for model in models] == ["demo"]


def test_adapters_of_a_clip_are_sent_kept_and_restored(adapted: Page) -> None:
    adapted.fill(prompt="rain", duration=0.5, steps=2)
    assert "loras" not in adapted.make_clip()["order"]["fields"]
    move(adapted, "tape", -0.5)
    move(adapted, "vinyl", 0.8)
    clip = adapted.make_clip()
    expected = [{"name": "vinyl", "strength": 0.8}, {"name": "tape", "strength": -0.5}]
    assert clip["order"]["fields"]["loras"] == expected == adapted.run("return window.sent")
    assert adapted["clip-facts"].text.startswith("demo · vinyl 0.8, tape -0.5 · seed ")
    adapted.click("mark-region")
    assert adapted.make_clip("regenerate")["order"]["fields"]["loras"] == expected
    assert adapted.run("return window.sent") == expected
    adapted.open()
    assert strengths(adapted) == {"vinyl": "off", "tape": "off"}
    adapted.browser.find_element(By.CSS_SELECTOR, "#clips .what").click()
    adapted.click("load-settings")
    assert strengths(adapted) == {"vinyl": "0.8", "tape": "-0.5"}


@pytest.mark.slow
def test_clip_can_be_copied_as_python(adapted: Page) -> None:
    move(adapted, "vinyl", 1.5)
    adapted.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    adapted.run(
        "Object.defineProperty(navigator, 'clipboard', { value: { writeText: (text) => (window.copied = text) } })"
    )
    adapted.run("document.querySelector('[data-copy=python]').click()")
    adapted.until(lambda: adapted.run("return window.copied"))
    assert 'loras=[{"name": "vinyl", "strength": 1.5}]' in adapted.run("return window.copied")


@pytest.mark.slow
def test_settings_with_an_unloaded_adapter_are_not_loaded(adapted: Page) -> None:
    move(adapted, "vinyl", 1)
    adapted.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    adapted.fill(prompt="hail")
    adapted.run("window.hidesAdapters = true; document.getElementById('key-dialog').returnValue = 'save'")
    adapted.run("document.getElementById('key-dialog').dispatchEvent(new Event('close'))")  # reads the list again
    adapted.until(lambda: not strengths(adapted))
    adapted.click("load-settings")
    assert adapted["form-error"].text == "The server no longer has the adapter vinyl."
    assert adapted["prompt"].get_attribute("value") == "hail"


def test_page_without_adapters_has_no_sliders(page: Page) -> None:
    assert strengths(page) == {}
    assert not page.browser.find_element(By.CSS_SELECTOR, "[data-field=loras]").is_displayed()
