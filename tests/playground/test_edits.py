"""Edits of clips on the playground page (regions, extensions, variations of a file), and loops."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.audio_files import make_audio_file
from tests.playground.conftest import Page

pytestmark = pytest.mark.server


def test_dragged_region_is_regenerated(page: Page) -> None:
    first = page.fill(prompt="a 440 Hz sine tone", duration=2, steps=2).make_clip()
    box = page["wave"].size
    start = ActionChains(page.browser).move_to_element_with_offset(page["wave"], -box["width"] // 8, -60)
    start.click_and_hold().move_by_offset(40, 0).move_by_offset(box["width"] // 8, 0).release().perform()
    page.until(lambda: page["region-tools"].is_displayed())
    assert "of the clip" in page["region-line"].text
    second = page.make_clip("regenerate")
    ((start_s, end_s),) = second["order"]["regions"]
    assert 0 < start_s < end_s < 2
    assert second["order"]["fields"]["duration"] == 2
    assert second["bytes"] == first["bytes"]


@pytest.mark.parametrize(
    ("start", "end", "length", "expected"),
    [
        (2, 3, 3, {"extend_after_s": 1}),
        (1.5, 2.5, 2.5, {"extend_after_s": 0.5, "regions": [[1.5, 2]]}),
        (-0.5, 0.25, 2.5, {"extend_before_s": 0.5, "regions": [[0, 0.25]]}),
        (-0.5, 0, 2.5, {"extend_before_s": 0.5}),
    ],
    ids=["past the end", "inside and past the end", "before the start and inside", "before the start"],
)
@pytest.mark.slow
def test_clip_is_extended(start: float, end: float, *, length: float, expected: dict[str, Any], page: Page) -> None:
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    page.click("mark-region")
    page.fill(**{"region-start": start})
    page["region-start"].send_keys(Keys.TAB)
    page.fill(**{"region-end": end})
    page["region-end"].send_keys(Keys.TAB)
    assert page["regenerate"].text == "Extend"
    order = page.make_clip("regenerate")["order"]
    made = {**order["fields"], "regions": order.get("regions")}
    names = ("extend_before_s", "extend_after_s", "regions")
    assert {name: made[name] for name in names if made.get(name)} == expected
    assert page.clips[-1]["bytes"] == length * 44100 * 4
    page.click("load-settings")
    assert page["source-name"].text.startswith("No source.")


@pytest.mark.slow
def test_strength_of_a_region_is_sent(page: Page) -> None:
    page.fill(prompt="rain", duration=2, steps=4).make_clip()
    page.click("mark-region")
    page.run("arguments[0].value = 0.5", page["region-strength"])
    assert page.make_clip("regenerate")["order"]["fields"]["init_noise_level"] == 0.5
    page.click("extend-after")
    assert not page["region-strength"].is_displayed()


@pytest.mark.slow
def test_dragging_past_an_end_extends_the_clip(page: Page) -> None:
    """If the user drags a region outside the clip, the region is enlarged until it touches the clip."""
    second = page["wave"].size["width"] / 4  # the view shows 4 s: the clip of 2 s and a second on each side

    def drag(start_s: float, end_s: float) -> None:
        start = ActionChains(page.browser).move_to_element_with_offset(page["wave"], round((start_s - 1) * second), -60)
        start.click_and_hold().move_by_offset(round((end_s - start_s) * second), 0).release().perform()

    def field(name: str) -> float:
        return float(page[name].get_attribute("value"))

    drag(0, 1)
    assert not page["region-tools"].is_displayed()
    page.fill(prompt="rain", duration=2, steps=2).make_clip()
    drag(-0.7, -0.2)
    page.until(lambda: "before the start of the clip" in page["region-line"].text)
    assert (field("region-start"), field("region-end")) == (pytest.approx(-0.7, abs=0.1), 0)
    drag(2.2, 2.8)
    page.until(lambda: "past the end of the clip" in page["region-line"].text)
    assert (field("region-start"), field("region-end")) == (2, pytest.approx(2.8, abs=0.1))
    fields = page.make_clip("regenerate")["order"]["fields"]
    assert "duration" not in fields
    assert fields["extend_after_s"] == pytest.approx(0.8, abs=0.1)


@pytest.mark.slow
def test_dropped_file_is_the_source(page: Page, tmp_path: Path) -> None:
    source = tmp_path / "door.wav"
    source.write_bytes(make_audio_file(duration_s=1.0))
    page.run(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (char) => char.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "door.wav", { type: "audio/wav" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true, bubbles: true }));
        """,
        b64encode(source.read_bytes()).decode(),
    )
    page.until(lambda: page["source-name"].text == "Source: door.wav, 1.00 s")
    assert page["init_noise_level"].is_displayed()
    clip = page.fill(prompt="rain", duration=1, steps=2).make_clip()
    assert clip["order"]["kind"] == "vary"
    assert clip["order"]["fields"]["init_noise_level"] == 0.9
    assert clip["order"]["source"] == source.stat().st_size
    page.click("source-clear")
    assert page.fill(duration=1).make_clip()["order"]["kind"] == "generate"


def test_source_that_cannot_be_read_is_no_lost_server(page: Page, tmp_path: Path) -> None:
    source = tmp_path / "door.wav"
    source.write_bytes(make_audio_file(duration_s=1.0))
    page["source-file"].send_keys(str(source))
    page.until(lambda: page["source-name"].text == "Source: door.wav, 1.00 s")
    source.unlink()
    page.run("window.fetch = () => new Promise(() => {})")  # Firefox never ends a request with such a file
    page.fill(prompt="rain", duration=1, steps=2).click("generate")
    page.until(page.field_errors)
    assert page.field_errors() == {"audio": "The file cannot be read, or it has changed. Choose it again."}
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li")


@pytest.mark.slow
def test_last_dropped_file_is_the_source(page: Page) -> None:
    """Two files are dropped. The first one takes longer to decode, so its audio is ready after the second one's."""
    page.run(
        """
        window.numDecoded = 0;
        const real = OfflineAudioContext.prototype.decodeAudioData;
        OfflineAudioContext.prototype.decodeAudioData = async function (bytes) {
          if (!window.numDecoded) window.first ??= new Promise((release) => (window.release = release));
          const isFirst = !window.asked;
          window.asked = true;
          const sound = await real.call(this, bytes);
          if (isFirst) await window.first;
          else setTimeout(window.release);
          setTimeout(() => (window.numDecoded += 1));
          return sound;
        };
        const bytes = Uint8Array.from(atob(arguments[0]), (char) => char.charCodeAt(0));
        for (const name of ["slow.wav", "last.wav"]) {
          const data = new DataTransfer();
          data.items.add(new File([bytes], name, { type: "audio/wav" }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true, bubbles: true }));
        }
        """,
        b64encode(make_audio_file(duration_s=1.0)).decode(),
    )
    page.until(lambda: page.run("return window.numDecoded") == 2)
    assert page["source-name"].text == "Source: last.wav, 1.00 s"


@pytest.mark.slow
def test_form_makes_a_clip_once_it_has_a_source(page: Page) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    for kind in ("loop", "piece"):
        page.browser.find_element(By.CSS_SELECTOR, f"input[value={kind}]").click()
        page.click("use-source")
        assert page["source-box"].is_displayed()
    assert page.make_clip()["order"]["kind"] == "vary"


@pytest.mark.slow
def test_loaded_duration_is_empty_if_none_was_set(page: Page) -> None:
    page.fill(prompt="rain", duration="", steps=2).make_clip()
    page.fill(duration=3).click("load-settings")
    assert page["duration"].get_attribute("value") == ""


@pytest.mark.slow
def test_loop_prompt_has_tempo_and_key(page: Page) -> None:
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    assert not page["source-box"].is_displayed()
    clip = page.fill(prompt="kick drums", bpm=120, bars=1, key="C minor", steps=2).make_clip()
    assert clip["order"]["fields"]["prompt"] == "kick drums 120bpm in C minor"
    assert clip["bytes"] == 2 * 44100 * 4
    assert "loop · 0:02.0" in page["clips"].text
    page.fill(prompt="x", bpm=90, bars=2, key="").click("load-settings")
    values = [page[name].get_attribute("value") for name in ("prompt", "bpm", "bars", "key")]
    assert values == ["kick drums", "120", "1", "C minor"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "key", "sent"),
    [
        ("techno drums 128bpm in a warehouse", "", "techno drums 128bpm in a warehouse"),
        ("drums 90bpm and 120bpm", "", "drums 90bpm and 120bpm"),
        ("drums in a hall", "", "drums in a hall 120bpm"),
        ("drums", "F♯ major", "drums 120bpm in F♯ major"),
    ],
)
def test_loaded_loop_has_the_prompt_that_was_written(written: str, key: str, *, sent: str, page: Page) -> None:
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    clip = page.fill(prompt=written, bpm=120, bars=1, key=key, steps=2).make_clip()
    assert clip["order"]["fields"]["prompt"] == sent
    page.fill(prompt="x", key="D minor").click("load-settings")
    assert [page[name].get_attribute("value") for name in ("prompt", "key")] == [written, key]
