"""Clips on the playground page: generate, play, compare and repeat them, and their storage in the browser."""

from __future__ import annotations

import io
import zipfile
from base64 import b64decode
from dataclasses import dataclass
from hashlib import sha256

import httpx
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.patience import PATIENCE_S
from tests.playground.conftest import Page
from tests.playground.test_stage import WORKING, drag

pytestmark = pytest.mark.server


@dataclass(frozen=True, slots=True)
class Played:
    """How a clip was played: the latest time that the page's clock has shown, and the audio device's time, seconds.

    On a busy machine, the page's clock may not show the last part of the clip, and the device's time is longer.
    """

    shown_s: float
    sounded_s: float


def play_to_end(page: Page) -> Played:
    """Play the shown clip to its end."""
    page.browser.execute_async_script(
        """
        const [done] = arguments;
        window.shown = [];
        window.changed = []; // the audio device's times at which playback began and ended
        const [clock, play] = ["clock", "play"].map((id) => document.getElementById(id));
        new MutationObserver(() => shown.push(parseFloat(clock.value.slice(2)))).observe(clock, { childList: true });
        import("./playground/audio.js").then(({ audioContext }) => {
          new MutationObserver(() => changed.push(audioContext().currentTime)).observe(play, { childList: true });
          done();
        });
        """
    )
    page.click("play")
    page.until(lambda: page.run("return changed.length") >= 2)
    assert page["play"].text == "Play"
    began_s, ended_s = page.run("return changed")
    return Played(float(max(page.run("return shown"))), ended_s - began_s)


def test_clip_is_generated_and_played_to_its_end(page: Page) -> None:
    clip = page.fill(prompt="a 440 Hz sine tone", duration=1, steps=2).make_clip()
    assert clip["order"]["fields"]["prompt"] == "a 440 Hz sine tone"
    assert clip["bytes"] == 44100 * 4
    assert page["clip-name"].text == "a 440 Hz sine tone"
    assert f"seed {clip['facts']['seed']} · 0:01.00" in page["clip-facts"].text
    assert "cpu float32" in page["clip-facts"].text
    played = play_to_end(page)
    assert played.sounded_s > 0.9
    assert 0.0 < played.shown_s <= 1.0


@pytest.mark.slow
def test_looped_playback_continues_until_stopped(page: Page) -> None:
    page.fill(prompt="a kick drum", duration=0.5, steps=2).make_clip()
    page.click("loop")
    page.click("play")
    page.run(
        """
        window.jumps = 0;
        let before = 0;
        const clock = document.getElementById("clock");
        new MutationObserver(() => {
          const now = parseFloat(clock.value.slice(2));
          if (now < before) jumps += 1;
          before = now;
        }).observe(clock, { childList: true });
        """
    )
    page.until(lambda: page.run("return jumps") >= 2)
    assert page["play"].text == "Pause"
    page.browser.find_element(By.TAG_NAME, "h1").click()
    ActionChains(page.browser).send_keys(" ").perform()
    page.until(lambda: page["play"].text == "Play")


@pytest.mark.slow
def test_repeated_play_calls_start_playback_once(page: Page) -> None:
    page.browser.find_element(By.TAG_NAME, "h1").click()  # without a click on the page, browsers do not play audio
    num_nodes, num_ticks = page.browser.execute_async_script(
        """
        const [done] = arguments;
        let nodes = 0;
        let ticks = 0;
        const Node = window.AudioBufferSourceNode;
        window.AudioBufferSourceNode = class extends Node {
          constructor(...all) { super(...all); nodes += 1; }
        };
        const frame = () => new Promise(requestAnimationFrame);
        import("./playground/player.js").then(async ({ Player }) => {
          const sound = new AudioBuffer({ length: 44100 * 60, sampleRate: 44100 });
          const player = new Player([sound], { onTick: () => (ticks += 1), onEnd: () => {} });
          await Promise.all([player.play(), player.play()]);
          const started = nodes;
          for (let count = 0; count < 20; count += 1) await player.seek(count);
          ticks = 0;
          for (let count = 0; count < 10; count += 1) await frame();
          player.stop();
          done([started, ticks]);
        });
        """
    )
    assert num_nodes == 1
    assert num_ticks <= 11


# Counts the sources of sound that play. The audio device opens only after `window.release()`.
SLOW_DEVICE = """
const released = new Promise((release) => (window.release = release));
const { resume } = AudioContext.prototype;
AudioContext.prototype.resume = async function () {
  await released;
  return resume.call(this);
};
window.sounding = new Set();
const { start, stop } = AudioBufferSourceNode.prototype;
AudioBufferSourceNode.prototype.start = function (...all) {
  sounding.add(this);
  return start.apply(this, all);
};
AudioBufferSourceNode.prototype.stop = function (...all) {
  sounding.delete(this);
  return stop.apply(this, all);
};
"""


@pytest.mark.slow
def test_only_the_shown_clip_plays_once_the_device_is_open(page: Page) -> None:
    page.fill(prompt="a snare", duration=4, steps=2).make_clip()
    page.fill(prompt="rain").make_clip()
    page.run(SLOW_DEVICE)
    page.click("play")
    page.browser.find_elements(By.CSS_SELECTOR, "#clips .what")[1].click()
    page.until(lambda: page["clip-name"].text == "a snare")
    page.click("play")
    drag(page, 1, 1)  # a click on the waveform moves the playhead
    page.run("window.release()")
    page.until(lambda: page["play"].text == "Pause")
    assert page.run("return sounding.size") == 1
    page.until(lambda: page["clock"].text.startswith("0:01."))
    page.click("play")
    assert page.run("return sounding.size") == 0


@pytest.mark.slow
def test_new_clip_is_played_automatically(page: Page) -> None:
    page.click("autoplay")
    page.fill(prompt='<img src=x onerror="document.title=1">"{nonce}', duration=1, steps=2).make_clip()
    page.until(lambda: page["play"].text == "Pause")
    assert page["clip-name"].text == '<img src=x onerror="document.title=1">"{nonce}'
    assert page.browser.title == "stable-audio-serve"
    page.until(lambda: page["play"].text == "Play")


def compare_two_clips(page: Page) -> None:
    """Make two clips, and let the first of them sound while the second is shown."""
    page.fill(prompt="a 440 Hz sine tone", duration=1, steps=2).make_clip()
    page.fill(prompt="rain").make_clip()
    page.click("ab")
    page.until(lambda: page["ab"].get_attribute("aria-pressed") == "true")


@pytest.mark.slow
def test_silent_mode_of_an_iphone_does_not_mute_clips(page: Page) -> None:
    page.run("navigator.audioSession = { type: 'auto' }")
    page.browser.execute_async_script(
        "const [done] = arguments; import('./playground/audio.js').then((audio) => done(void audio.audioContext()))"
    )
    assert page.run("return navigator.audioSession.type") == "playback"


@pytest.mark.slow
def test_two_clips_are_compared_at_equal_loudness(page: Page) -> None:
    compare_two_clips(page)
    assert "a 440 Hz sine tone" in page.status_text
    page.click("ab")
    page.until(lambda: page["ab"].get_attribute("aria-pressed") == "false")
    script = "import('./playground/audio.js').then((audio) => done(audio.equalGains([-10, -16, null])))"
    gains = page.browser.execute_async_script(f"const [done] = arguments; {script}")
    assert gains == [pytest.approx(10 ** (-6 / 20)), 1, 1]


@pytest.mark.slow
def test_shown_clip_is_audible_again_if_the_compared_one_is_deleted(page: Page) -> None:
    compare_two_clips(page)
    page.browser.find_elements(By.CSS_SELECTOR, "#clips .delete")[1].click()
    page.until(lambda: page["ab"].get_attribute("aria-pressed") == "false")
    assert page.status_text == "Playing the shown clip"
    assert not page["ab"].is_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("other_s", [0.3, 2])
def test_compared_clip_plays_as_long_as_the_shown_one(other_s: float, page: Page) -> None:
    page.fill(prompt="a 440 Hz sine tone", duration=other_s, steps=2).make_clip()
    page.fill(prompt="rain", duration=1).make_clip()
    page.click("ab")
    page.until(lambda: page["ab"].get_attribute("aria-pressed") == "true")
    played = play_to_end(page)
    assert played.sounded_s > 0.9
    assert 0.5 < played.shown_s <= 1.0


@pytest.mark.slow
def test_repeated_clip_is_identical_and_settings_are_restored(page: Page, served: str) -> None:
    clip = page.fill(prompt="a snare", duration=0.5, steps=3, cfg_scale=2, negative_prompt="hiss", seed=77).make_clip()
    page.click("repeat")
    page.until(lambda: page.status_text.startswith("Identical bytes"))
    page.fill(prompt="something else", steps=5, seed=1)
    page.click("load-settings")
    values = {name: page[name].get_attribute("value") for name in ("prompt", "steps", "seed", "negative_prompt")}
    assert values == {"prompt": "a snare", "steps": "3", "seed": "77", "negative_prompt": "hiss"}
    assert page["seed-lock"].get_attribute("aria-pressed") == "true"
    again = page.make_clip()
    assert again["order"] == clip["order"]
    reply = httpx.post(f"{served}/v1/audio/generations", json=clip["order"]["fields"], timeout=PATIENCE_S)
    digest = sha256(reply.content).hexdigest()
    page.click("repeat")
    page.until(lambda: digest in page.status_text)


@pytest.mark.slow
def test_repeat_compares_with_the_original_clip(page: Page) -> None:
    page.fill(prompt="a snare", duration=0.5, steps=2).make_clip()
    page.fill(prompt="rain").make_clip()
    page.run(
        """
        const real = window.fetch;
        window.fetch = async (url, options) => {
          const reply = await real(url, options);
          if (String(url).endsWith("/replay")) await new Promise((release) => (window.release = release));
          return reply;
        };
        """
    )
    page.click("repeat")
    page.until(lambda: page.run("return Boolean(window.release)"))
    page.run("document.querySelector('#clips li:last-child .what').click()")
    page.until(lambda: page["clip-name"].text == "a snare")
    page.run("window.release()")
    page.until(lambda: page.status_text.startswith("Identical bytes"))


@pytest.mark.slow
def test_last_selected_clip_is_shown(page: Page) -> None:
    """Two clips are selected. The first one takes longer to decode, so its audio is ready after the second one's."""
    page.fill(prompt="a snare", duration=0.5, steps=2).make_clip()
    page.fill(prompt="rain").make_clip()
    page.run(
        """
        const real = OfflineAudioContext.prototype.decodeAudioData;
        const released = new Promise((release) => (window.release = release));
        let numAsked = 0;
        window.numDecoded = 0;
        OfflineAudioContext.prototype.decodeAudioData = async function (bytes) {
          const isFirst = (numAsked += 1) === 1;
          const sound = await real.call(this, bytes);
          if (isFirst) await released;
          setTimeout(() => (window.numDecoded += 1));
          return sound;
        };
        const [latest, first] = document.querySelectorAll("#clips li .what");
        first.click();
        latest.click();
        """
    )
    page.until(lambda: page.run("return numDecoded"))
    page.run("window.release()")
    page.until(lambda: page.run("return numDecoded") >= 2)
    assert page["clip-name"].text == "rain"


@pytest.mark.slow
def test_settings_of_an_unserved_model_are_not_loaded(page: Page) -> None:
    """The model of a stored clip may be missing, because another server may run at the same address later."""
    page.fill(prompt="a snare", duration=0.5, steps=2).make_clip()
    page.browser.execute_async_script(
        """
        const [done] = arguments;
        const open = indexedDB.open("stable-audio-serve");
        open.onsuccess = () => {
          const clips = open.result.transaction("takes", "readwrite").objectStore("takes");
          clips.getAll().onsuccess = ({ target: { result: [clip] } }) => {
            clip.order.fields.model = "former";
            clips.put(clip);
          };
          clips.transaction.oncomplete = () => { open.result.close(); done(); };
        };
        """
    )
    page.open()
    page.run("document.querySelector('#clips .what').click()")
    page.click("load-settings")
    page.until(lambda: page["form-error"].text == "The server no longer has the model former.")
    assert page["model"].get_attribute("value") == "demo"


@pytest.mark.slow
def test_clips_last_until_reload_when_storage_is_full(page: Page) -> None:
    page.run("IDBObjectStore.prototype.put = function () { throw new DOMException('full', 'QuotaExceededError') }")
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "cannot store the clip" in page.status_text)
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#clips li")) == 1
    assert page.clips == []


# As in Firefox for a site whose cookies are blocked.
BLOCKED = """
    const refuse = () => { throw new DOMException("The operation is insecure.", "SecurityError"); };
    const names = ["indexedDB", "localStorage", "sessionStorage"];
    for (const name of names) Object.defineProperty(window, name, { get: refuse });
    window.BroadcastChannel = class { constructor() { refuse(); } };
"""


@pytest.mark.slow
def test_clips_last_until_reload_when_storage_is_blocked(page: Page) -> None:
    added = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": BLOCKED})
    try:
        page.open().fill(prompt="rain", duration=0.5, steps=2).click("generate")
        page.until(lambda: "cannot store the clip" in page.status_text)
    finally:
        page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#clips li")) == 1


@pytest.mark.slow
def test_tabs_share_the_list_of_clips(page: Page) -> None:
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    second = page.open().browser.current_window_handle
    page.browser.switch_to.window(first)
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.browser.switch_to.window(second)
    page.until(lambda: len(page.browser.find_elements(By.CSS_SELECTOR, "#clips li")) == 1)
    page.browser.close()
    page.browser.switch_to.window(first)


@pytest.mark.slow
def test_tab_shows_its_clip_if_another_tab_has_stored_it(page: Page) -> None:
    page.run(WORKING)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]"))
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    page.open().until(lambda: page.clips)
    page.browser.close()
    page.browser.switch_to.window(first)
    page.run("window.release()")
    page.until(lambda: page["clip-name"].text == "rain")
    page.until(lambda: page.status_text.startswith("Generated in"))
    assert len(page.clips) == 1


@pytest.mark.slow
def test_clip_stays_listed_if_another_tab_changes_the_list(page: Page) -> None:
    """This tab reads the other tab's change after it has made its clip, but before it has stored it."""
    page.run(
        """
        const open = indexedDB.open("stable-audio-serve");
        open.onsuccess = () => {
          const clips = open.result.transaction("takes", "readwrite").objectStore("takes"); // others wait for it
          const hold = () => (clips.count().onsuccess = () => (window.isReleased ? open.result.close() : hold()));
          hold();
          new BroadcastChannel("stable-audio-serve").postMessage("takes");
        };
        """
    )
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page["clip-name"].text == "rain")
    page.run("window.isReleased = true")
    page.until(lambda: page.clips)
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#clips li"))


@pytest.mark.slow
def test_keyboard_focus_goes_on_to_the_next_clip_after_a_deletion(page: Page) -> None:
    for prompt in ("hail", "rain", "snow"):
        page.fill(prompt=prompt, duration=0.5, steps=2).make_clip()

    def focused() -> str:
        name: str = page.run("return document.activeElement.ariaLabel ?? document.activeElement.tagName")
        return name.split(",")[0]

    page.browser.find_elements(By.CSS_SELECTOR, "#clips .delete")[1].send_keys(Keys.ENTER)
    page.until(lambda: focused() == "Delete hail")
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: focused() == "Delete snow")
    page.browser.find_element(By.CSS_SELECTOR, "#clips .delete").click()  # by mouse, so that Space plays
    page.until(lambda: focused() == "BODY")


@pytest.mark.slow
def test_message_about_a_clip_ends_with_its_display(page: Page) -> None:
    page.fill(prompt="a snare", duration=0.5, steps=2).make_clip()
    page.fill(prompt="rain").make_clip()
    page.until(lambda: page.status_text.startswith("Generated in"))
    page.run("document.querySelector('#clips li:last-child .what').click()")
    page.until(lambda: page["clip-name"].text == "a snare")
    assert page.status_text == ""


@pytest.mark.slow
def test_rows_show_kind_length_parent_and_favourites(page: Page) -> None:
    first = page.fill(prompt="rain", duration=2, steps=2).make_clip()
    page.click("mark-region")
    page.make_clip("regenerate")
    page.click("extend-after")
    page.make_clip("regenerate")
    page.click("use-source")
    page.make_clip()
    page.open()
    lines = [row.text for row in page.browser.find_elements(By.CSS_SELECTOR, "#clips small")]
    assert [line.split(" · ")[:2] for line in lines] == [
        ["variation", "0:02.0"],
        ["extended", "0:03.0"],
        ["region", "0:02.0"],
        ["clip", "0:02.0"],
    ]
    assert lines[2].endswith(f"from rain, seed {first['facts']['seed']}")
    assert not page["only-favourites"].is_displayed()
    page.browser.find_elements(By.CSS_SELECTOR, "#clips .star")[1].click()
    page.until(lambda: [clip.get("isFavourite") for clip in page.clips] == [None, None, True, None])
    page.open()
    page.click("only-favourites")
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#clips li")) == 1
    page.click("only-favourites")
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#clips li")) == 4


@pytest.mark.slow
def test_forget_all_asks_first(page: Page) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    page.click("forget-all")
    assert page["forget-text"].text == "This deletes 1 clip from this browser."
    assert page.run("return document.activeElement.value") == "cancel"
    assert page.accessibility_problems() == []
    page.browser.find_element(By.CSS_SELECTOR, "#forget-dialog [value=cancel]").click()
    assert len(page.clips) == 1
    page.click("forget-all")
    page.browser.find_element(By.CSS_SELECTOR, "#forget-dialog [value=forget]").click()
    page.until(lambda: not page.clips)
    assert page["no-clips"].is_displayed()


@pytest.mark.slow
def test_deleted_clip_leaves_the_stage(page: Page) -> None:
    compare_two_clips(page)
    page.click("mark-region")
    page.browser.find_element(By.CSS_SELECTOR, "#clips .delete").click()
    page.until(lambda: page["clip-name"].text == "No clip selected")
    assert page.shown is None
    for name in ("play", "loop", "ab", "zoom-in"):
        assert not page[name].is_enabled()
    for name in ("playhead", "region-tools", "clip-tools", "recipe"):
        assert not page[name].is_displayed()
    assert page["clock"].text == "0:00.00 / 0:00.00"
    page["wave"].click()
    page.browser.find_element(By.CSS_SELECTOR, "#clips .what").click()
    page.until(lambda: page.shown is not None)
    assert page["play"].is_enabled()
    assert not page["ab"].is_enabled()
    page.make_clip()
    assert page["ab"].is_enabled()


# When the page creates an object URL for a file, stores the file in `window.kept`. Scripts cannot load the file from
# the URL, because the page's security policy forbids this.
KEPT = """
window.kept = {};
const make = URL.createObjectURL;
URL.createObjectURL = (blob) => {
  const address = make(blob);
  window.kept[address] = blob;
  return address;
};
"""


def kept_file(page: Page, address: str) -> bytes:
    """Returns the file at an object URL."""
    script = """
        const [address, done] = arguments;
        window.kept[address].arrayBuffer().then((buffer) => {
          done(btoa(new Uint8Array(buffer).reduce((text, byte) => text + String.fromCharCode(byte), "")));
        });
    """
    return b64decode(page.browser.execute_async_script(script, address))


@pytest.mark.slow
def test_chosen_clips_are_saved_as_a_zip(page: Page) -> None:
    page.fill(prompt="雨 rain", duration=0.5, steps=2, seed=5).make_clip()
    page.fill(seed=5).make_clip()
    page.fill(prompt="wind", seed=6).make_clip()
    for box in page.browser.find_elements(By.CSS_SELECTOR, "#clips [type=checkbox]")[1:]:
        box.click()
    assert page["zip"].text == "Download ZIP (2)"
    page.run(
        KEPT
        + """
        HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href]; };
        document.getElementById("zip").click();
        """
    )
    page.until(lambda: page.run("return window.saved"))
    name, address = page.run("return window.saved")
    assert name == "clips.zip"
    archive = zipfile.ZipFile(io.BytesIO(kept_file(page, address)))
    assert archive.testzip() is None
    assert archive.namelist() == ["雨-rain-5.wav", "雨-rain-5-2.wav"]
    first, second = (archive.read(name) for name in archive.namelist())
    assert first == second
    assert first[:4] == b"RIFF"


@pytest.mark.slow
def test_clip_dragged_out_of_the_window_is_a_file(page: Page) -> None:
    page.fill(prompt="rain", duration=0.5, steps=2, seed=5).make_clip()
    kind, name, address = page.run(
        KEPT
        + """
        const dataTransfer = new DataTransfer();
        const row = document.querySelector("#clips li");
        row.dispatchEvent(new DragEvent("dragstart", { dataTransfer, bubbles: true }));
        const [, ...parts] = /^(.*?):(.*?):(.*)$/.exec(dataTransfer.getData("DownloadURL"));
        return parts;
        """
    )
    assert page.run("return document.querySelector('#clips li').draggable")
    assert (kind, name) == ("audio/wav", "rain-5.wav")
    assert len(kept_file(page, address)) > 22050 * 4


@pytest.mark.slow
def test_loops_are_looped_and_clips_as_the_user_chose(page: Page) -> None:
    def is_looped() -> bool:
        return page["loop"].get_attribute("aria-pressed") == "true"

    page.fill(prompt="rain", duration=0.5, steps=2).make_clip()
    assert not is_looped()
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    clip = page.fill(prompt="drums at 240 BPM", bpm=240, bars=1).make_clip()
    assert is_looped()
    assert clip["order"]["fields"]["prompt"] == "drums at 240 BPM"
    page.browser.find_elements(By.CSS_SELECTOR, "#clips .what")[1].click()
    page.until(lambda: page["clip-name"].text == "rain")
    assert not is_looped()
