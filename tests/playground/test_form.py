"""The form of the playground page: errors next to their fields, allowed ranges, long prompts, and the API key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from stable_audio_serve.core.keys import hash_key, make_key
from tests.playground.conftest import Page, serve

pytestmark = pytest.mark.server

# Values of the fields that are shown.
VALUES = """
  const fields = [...document.querySelectorAll("#form :is(input, textarea, select)")];
  return fields.filter((field) => field.type !== "radio" || field.checked).map((field) => [field.id, field.value]);
"""


def test_error_is_shown_at_its_field(page: Page) -> None:
    page.fill(prompt="rain", steps=2, duration=0, seed=2**70)
    page.click("generate")
    page.until(page.field_errors)
    assert set(page.field_errors()) == {"seed", "duration"}
    assert page["seed"].get_attribute("aria-invalid") == "true"
    assert "greater than 0" in page.field_errors()["duration"]
    assert page.run("return document.activeElement.id") == "duration"
    assert set(page.fill(duration=0.5).field_errors()) == {"seed"}
    assert page.fill(seed=2).make_clip()
    page.messages()  # clears the console, in which the browser has logged the refused requests


def test_error_of_a_proxy_has_a_plain_message(page: Page) -> None:
    bodies = ["<html>", "null", "[]", '{"error": true}', '{"error": {"code": 503}}', '{"detail": [{"msg": "x"}]}']
    messages = page.browser.execute_async_script(
        """
        const [bodies, done] = arguments;
        import("/playground/api.js").then(async ({ call }) => {
          const messages = [];
          for (const body of bodies) {
            window.fetch = async () => new Response(body, { status: 503, headers: { "Retry-After": "5" } });
            await call("jobs").catch((error) => messages.push(`${error.status} ${error.message}`));
          }
          window.fetch = async () => new Response("<html>", { headers: { "Content-Type": "text/html" } });
          await call("jobs").catch((error) => messages.push(error.message));
          done(messages);
        });
        """,
        bodies,
    )
    *refused, page_of_a_proxy = messages
    assert refused == ["503 The server responded with status 503. Try again in 5 s."] * len(bodies)
    assert page_of_a_proxy == "The server responded with a web page."


@pytest.mark.slow
def test_invalid_input_is_shown_without_a_request(page: Page) -> None:
    page.fill(prompt=" ", steps="1e", duration=99, batch_size=99, target_lufs=-90, fade_in_s=-1).click("generate")
    page.until(page.field_errors)
    assert page.field_errors() == {
        "prompt": "Enter a prompt.",
        "steps": "Enter a whole number from 1 to 50.",
        "duration": "Enter a number from 0 to 48.48.",
        "batch_size": "Enter a whole number from 1 to 4.",
        "loudness": "Enter a number from -70 to -5.",
        "fade_in_s": "Enter a number of at least 0.",
    }
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    page.fill(prompt="rain", steps=2, batch_size=1, target_lufs="", fade_in_s="", bpm="").click("generate")
    page.until(lambda: page.field_errors() == {"bpm": "Enter a number from 1 to 1000."})
    page.browser.find_element(By.CSS_SELECTOR, "input[value=piece]").click()
    page.run("document.querySelector('#sections li:last-child .duration').value = ''")
    page.click("generate")
    page.until(lambda: page.field_errors() == {"sections": "Enter a number of at least 1."})
    assert page.run("return document.activeElement.ariaLabel") == "Length of section 2, seconds"
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #clips li")


@pytest.mark.slow
def test_loudness_and_fades_are_sent_and_restored(page: Page) -> None:
    values = {"target_lufs": -20, "true_peak_dbtp": -2, "fade_in_s": 0.1, "fade_out_s": 0.2}
    clip = page.fill(prompt="a 440 Hz sine tone", duration=2, steps=2, **values).make_clip()
    fields = clip["order"]["fields"]
    assert fields["loudness"] == {"target_lufs": -20, "true_peak_dbtp": -2}
    assert (fields["fade_in_s"], fields["fade_out_s"]) == (0.1, 0.2)
    assert clip["facts"]["loudness"] == pytest.approx(-20, abs=1)
    page.click("use-source")
    varied = page.fill(init_noise_level=0.5).make_clip()
    assert varied["facts"]["loudness"] == pytest.approx(-20, abs=1)
    page.fill(**dict.fromkeys(values, 0)).click("load-settings")
    assert {name: float(page[name].get_attribute("value") or "nan") for name in values} == values
    page.fill(target_lufs=-2).click("generate")
    page.until(lambda: "loudness" in page.field_errors())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "loop", "piece"])
def test_returning_to_the_page_restores_what_was_entered(kind: str, page: Page) -> None:
    page.open()
    page.run("document.querySelector(`input[name=kind][value=${arguments[0]}]`).click()", kind)
    page.fill(prompt="rain", steps=3)
    page.run("addEventListener('unload', () => {})")  # so that the browser does not keep the page, only its values
    entered = page.run(VALUES)
    page.browser.get(f"{page.url.rstrip('/')}/docs")
    page.browser.back()
    page.until(lambda: page.run("return document.documentElement.dataset.ready"))
    assert page.run(VALUES) == entered


def test_strengths_are_shown(page: Page) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.click("use-source")
    page.click("mark-region")
    for name, first, second in (("init_noise_level", "0.9", "0.89"), ("region-strength", "1", "0.95")):
        shown = page.browser.find_element(By.CSS_SELECTOR, f"output[for={name}]")
        assert shown.text == first
        page[name].send_keys(Keys.ARROW_LEFT)
        assert shown.text == second


@pytest.mark.slow
def test_shown_bounds_are_valid_input(page: Page) -> None:
    shown = page.browser.find_element(By.CSS_SELECTOR, "[data-field=duration] .range").text
    assert re.fullmatch(r"0 to \d+(\.\d\d?)?", shown)


@pytest.mark.slow
def test_a_long_seed_is_visible_as_a_whole(page: Page) -> None:
    page.fill(seed=2**32 - 1)
    assert page.run("return arguments[0].scrollWidth <= arguments[0].clientWidth", page["seed"])


@pytest.mark.slow
def test_page_handles_prompts_of_100000_characters(page: Page) -> None:
    page.fill(duration=0.5, steps=2)
    page.run("for (const id of ['prompt', 'negative_prompt']) document.getElementById(id).value = '雨'.repeat(100_000)")
    height = page.run("return document.body.scrollHeight")
    clip = page.make_clip()
    assert len(clip["order"]["fields"]["prompt"]) == 100_000
    page.click("mark-region")
    assert page.run("return document.body.scrollHeight") < height + 400
    page.click("repeat")
    page.until(lambda: page.status_text.startswith("Identical bytes"))


@pytest.mark.slow
def test_key_is_requested_and_stored_for_the_tab_only(page: Page, tmp_path: Path) -> None:
    key = make_key()
    (tmp_path / "keys").write_text(f"alice:{hash_key(key)} audio-seconds-per-minute=2\n")
    with serve(api={"key_file": str(tmp_path / "keys")}) as url:
        locked = Page(page.browser, url).open(is_ready=False)
        locked.until(lambda: locked["key-dialog"].is_displayed())
        locked.browser.find_element(By.CSS_SELECTOR, "button[value=cancel]").click()
        locked.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
        locked.browser.find_element(By.CSS_SELECTOR, "input[value=clip]").click()
        locked.fill(prompt="rain").click("generate")
        locked.until(lambda: locked["key-dialog"].is_displayed())
        assert not [message for message in locked.messages() if "Uncaught" in message]
        locked["api-key"].send_keys("wrong", Keys.ENTER)
        locked.until(lambda: "key" in locked["key-error"].text.lower() and locked["key-dialog"].is_displayed())
        locked.run("document.getElementById('api-key').value = ''")
        locked["api-key"].send_keys(key, Keys.ENTER)
        locked.until(lambda: locked.browser.find_elements(By.CSS_SELECTOR, "#model option"))
        assert locked.fill(prompt="rain", duration=0.5, steps=2).make_clip()["bytes"] == 22050 * 4
        locked.fill(duration=4).click("generate")
        locked.until(lambda: "more than this key may have in a minute" in locked["jobs"].text)
        assert not locked["key-dialog"].is_displayed()
        assert locked.run("return Object.values(sessionStorage)") == [key]
        assert key not in locked.run("return JSON.stringify(localStorage)")
        locked.messages()
        locked.browser.get("about:blank")


@pytest.mark.slow
def test_closing_the_key_dialog_does_not_save_the_key(page: Page) -> None:
    stored = "return Object.values(sessionStorage)"
    page.click("open-key")
    page["api-key"].send_keys("first", Keys.ENTER)
    page.until(lambda: page.run(stored) == ["first"])
    page.click("open-key")
    page["api-key"].send_keys("second")
    page.run("document.getElementById('open-key').click()")  # as a job does that is refused meanwhile
    assert page["api-key"].get_attribute("value") == "firstsecond"
    page.run("arguments[0].requestClose()", page["key-dialog"])  # Chromium empties `returnValue` only after Escape
    page.until(lambda: not page["key-dialog"].is_displayed())
    assert page.run(stored) == ["first"]
