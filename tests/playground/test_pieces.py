"""Long pieces on the playground page: their sections in the form, and listening to a piece while it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.playground.conftest import Page
from tests.playground.test_files import kept_audio, run_copied

pytestmark = [pytest.mark.server, pytest.mark.slow]


def choose_piece(page: Page, *sections: tuple[str, float]) -> None:
    """Fill the form with a long piece of sections (prompt, duration)."""
    page.run("document.querySelector('input[value=piece]').click()")
    rows = page.browser.find_elements(By.CSS_SELECTOR, "#sections li")
    for _ in sections[len(rows) :]:
        page.click("add-section")
    for row, section in zip(page.browser.find_elements(By.CSS_SELECTOR, "#sections li"), sections, strict=False):
        for field, value in zip(row.find_elements(By.TAG_NAME, "input"), section, strict=True):
            page.run("arguments[0].value = ''", field)
            field.send_keys(str(value))


# Delays the end of the job and of its audio until `window.release()` is called. Until then, the piece is unfinished.
HELD = """
const real = window.fetch;
const released = new Promise((release) => (window.release = release));
window.followed = 0;
window.fetch = async (url, options) => {
  const reply = await real(url, options);
  if (!/jobs.[0-9a-f]+.(events|audio)/.test(String(url))) return reply;
  const isAudio = String(url).includes("follow=1");
  let seen = 0;
  const held = new TransformStream({
    async transform(chunk, controller) {
      if (!isAudio) {
        const text = new TextDecoder().decode(chunk);
        if (text.includes("event: end")) await released;
        return controller.enqueue(chunk);
      }
      for (let at = 0; at < chunk.length; at += 4096) {
        if (seen >= arguments_bytes) await released;
        const part = chunk.subarray(at, at + 4096);
        seen += part.length;
        window.followed = seen;
        controller.enqueue(part);
      }
    },
  });
  return new Response(reply.body.pipeThrough(held), { status: reply.status, headers: reply.headers });
};
"""


def test_sections_are_added_removed_and_sent(page: Page) -> None:
    page.run("document.querySelector('input[value=piece]').click()")
    assert page["sections-total"].text == "0:40.0 in all"
    choose_piece(page, ("", 2), ("the rain stops", 1.5), ("birds", 3))
    names = [each.accessible_name for each in page.browser.find_elements(By.CSS_SELECTOR, "#sections input")]
    assert names[:2] == ["Prompt of section 1", "Length of section 1, seconds"]
    assert page["sections-total"].text == "0:06.5 in all"
    page.browser.find_element(By.CSS_SELECTOR, "[aria-label='Remove section 3']").click()
    assert not page["duration"].is_displayed()
    assert page.accessibility_problems() == []
    clip = page.fill(prompt="rain", steps=2).make_clip()
    assert clip["order"]["fields"]["sections"] == [{"duration": 2}, {"prompt": "the rain stops", "duration": 1.5}]
    assert clip["bytes"] == 3.5 * 44100 * 4
    assert "long piece · 0:03.5" in page["clips"].text
    page.run("document.querySelector('input[value=clip]').click()")
    page.click("load-settings")
    assert [row.get_attribute("value") for row in page.browser.find_elements(By.CSS_SELECTOR, "#sections .prompt")] == [
        "",
        "the rain stops",
    ]


def test_copied_commands_make_the_same_piece(page: Page, tmp_path: Path) -> None:
    choose_piece(page, ("", 1), ("wind", 1))
    page.fill(prompt="it's rain", steps=2).make_clip()
    assert run_copied(page, tmp_path)[1] == kept_audio(page)[0]
    assert not page["repeat"].is_displayed()


def test_a_growing_piece_is_played_before_it_is_finished(page: Page) -> None:
    """The page has received 2 of the piece's 6 s. It plays them, waits, and continues when the rest arrives."""
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.run(HELD.replace("arguments_bytes", str(2 * 44100 * 4)))
    choose_piece(page, ("", 2), ("", 2), ("", 2))
    page.click("autoplay")
    page.fill(prompt="a 440 Hz sine tone", steps=2).click("generate")
    page.until(lambda: page["play"].text == "Pause")
    assert not page["clip-tools"].is_displayed()
    page.until(lambda: page.run("return parseFloat(document.getElementById('clock').value.slice(2))") > 1.5)
    assert page.run("return window.followed") < 3 * 44100 * 4
    assert len(page.clips) == 1
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#clips .shown")
    page.run("window.release()")
    page.until(lambda: page.run("return parseFloat(document.getElementById('clock').value.slice(2))") > 4)
    page.until(lambda: page["play"].text == "Play")
    assert page["clip-tools"].is_displayed()
    assert page.clips[-1]["bytes"] == 6 * 44100 * 4
    page.until(lambda: page["clock"].text.endswith("0:06.00"))


# Holds back the end of a job and its audio after 2 s. `window.numOpen` counts the open connections for audio.
UNFINISHED = """
const real = window.fetch;
window.numOpen = 0;
window.fetch = async (url, options) => {
  const reply = await real(url, options);
  if (String(url).endsWith("/events")) {
    const unfinished = (await reply.text()).split("\\n\\n").filter((event) => !event.includes("event: end"));
    const start = (events) => events.enqueue(new TextEncoder().encode(`${unfinished.join("\\n\\n")}\\n\\n`));
    return new Response(new ReadableStream({ start }));
  }
  if (!String(url).includes("follow=1")) return reply;
  const wav = new Uint8Array(await reply.arrayBuffer());
  const close = () => (window.numOpen -= 1);
  const start = (audio) => {
    window.numOpen += 1;
    audio.enqueue(wav.subarray(0, 44 + 2 * 44100 * 4)); // the header and 2 s
    options.signal?.addEventListener("abort", () => (close(), audio.error(options.signal.reason)));
  };
  return new Response(new ReadableStream({ start, cancel: close }));
};
"""


def test_a_growing_piece_is_received_only_while_it_is_shown(page: Page) -> None:
    page.fill(prompt="wind", duration=0.5, steps=2).make_clip()
    page.run(UNFINISHED)
    choose_piece(page, ("", 2), ("", 2))
    page.fill(prompt="rain", steps=2).click("generate")
    for _ in range(2):
        page.until(lambda: page.run("return window.numOpen") == 1)
        page.browser.find_element(By.CSS_SELECTOR, "#clips .what").click()
        page.until(lambda: page["clip-name"].text == "wind")
        page.until(lambda: page.run("return window.numOpen") == 0)
        page.browser.find_element(By.CSS_SELECTOR, "[aria-label='Listen to rain']").click()
        page.until(lambda: page["clip-name"].text == "rain")


def test_a_cancelled_piece_keeps_its_finished_sections(page: Page) -> None:
    choose_piece(page, *[("", 20)] * 4)
    page.fill(prompt="rain", steps=50).click("generate")
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "[aria-label='Listen to rain']"))
    page.browser.find_element(By.CSS_SELECTOR, "[aria-label='Cancel rain']").click()
    page.until(lambda: page.clips)
    (clip,) = page.clips
    sections = clip["order"]["fields"]["sections"]
    assert 1 <= len(sections) < 4
    page.until(lambda: page["clip-tools"].is_displayed())
    assert f"long piece · 0:{20 * len(sections) % 60:02d}.0" in page["clips"].text.replace("1:", "0:")
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
