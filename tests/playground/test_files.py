"""Files of takes: downloaded, and made by the commands that are copied."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from base64 import b64decode, b64encode
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S
from tests.playground.conftest import Page

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2] / "stable_audio_serve" / "api" / "playground"


@pytest.mark.slow
def test_a_take_is_downloaded_in_the_format_that_is_chosen(page: Page, served: str, tmp_path: Path) -> None:
    page.fill(prompt="a snare", duration=0.5, steps=2, seed=5).take()
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    asked = {"prompt": "a snare", "model": "demo", "duration": 0.5, "steps": 2, "seed": 5}
    for form in ("wav", "flac", "mp3"):
        Select(page["format"]).select_by_visible_text(form)
        page.click("download")
        file = tmp_path / f"a-snare-5.{form}"
        page.until(file.exists)
        reply = httpx.post(f"{served}/v1/audio/generations", json=asked | {"response_format": form}, timeout=PATIENCE_S)
        page.until(lambda file=file, reply=reply: file.read_bytes() == reply.content)


def copy(page: Page, kind: str) -> str:
    """What the button puts into the clipboard."""
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    page.run("document.getElementById('said').textContent = ''")
    page.run("arguments[0].click()", page.browser.find_element(By.CSS_SELECTOR, f"[data-copy={kind}]"))
    page.until(lambda: page.said == "Copied.")
    script = "const [done] = arguments; navigator.clipboard.readText().then(done)"
    text: str = page.browser.execute_async_script(script)
    return text


def run_copied(page: Page, folder: Path) -> list[bytes]:
    """The files that the shown take's commands make, with what lies in the folder."""
    made = []
    for command in (["bash", "-c", copy(page, "curl")], [sys.executable, "-c", copy(page, "python")]):
        path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT.parents[2])}
        subprocess.run(command, cwd=folder, check=True, env=path)
        made.append((folder / "take.wav").read_bytes())
        (folder / "take.wav").unlink()
    return made


@pytest.mark.slow
def test_what_is_copied_makes_the_same(page: Page, served: str, tmp_path: Path) -> None:
    page.fill(prompt='it\'s a "snare"', duration=0.5, steps=2, seed=5).take()
    recipe = json.loads(copy(page, "json"))
    assert (recipe["seed"], recipe["prompt"]) == (5, 'it\'s a "snare"')
    asked = {"prompt": 'it\'s a "snare"', "model": "demo", "duration": 0.5, "steps": 2, "seed": 5}
    made = [
        httpx.post(f"{served}/v1/audio/replay", json=recipe, timeout=PATIENCE_S).content,
        httpx.post(f"{served}/v1/audio/generations", json=asked, timeout=PATIENCE_S).content,
    ]
    assert [*made, *run_copied(page, tmp_path)] == [made[0]] * 4


@pytest.mark.slow
def test_what_is_copied_of_an_edit_and_of_a_loop_makes_the_same(page: Page, tmp_path: Path) -> None:
    def expect_the_same() -> tuple[bytes, bytes]:
        """Returns the take's file and its source's."""
        files = page.browser.execute_async_script(
            """
            const [id, done] = arguments;
            const text = async (blob) => {
              const bytes = new Uint8Array(await blob.arrayBuffer());
              return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
            };
            import("./playground/store.js").then(async (store) => {
              await store.open();
              const { blob, order } = (await store.all("takes")).find((take) => take.id === id);
              done([await text(blob), order.source.name, await text(order.source)]);
            });
            """,
            page.shown,
        )
        made, source = b64decode(files[0]), b64decode(files[2])
        (tmp_path / files[1]).write_bytes(source)
        assert run_copied(page, tmp_path) == [made] * 2
        return made, source

    page.fill(prompt="a snare", duration=0.5, steps=2).take()
    page.click("use-source")
    page.fill(prompt='a "door"', init_noise_level=0.5).take()
    varied, _ = expect_the_same()
    page.click("mark-region")
    page.take("regenerate")
    _, source = expect_the_same()
    assert source == varied
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    page.fill(bpm=240, bars=1).take()
    expect_the_same()


@pytest.mark.slow
def test_a_wav_made_in_the_browser_is_the_same_sound(page: Page) -> None:
    audio = make_audio_file(duration_s=0.5)
    encoded = page.browser.execute_async_script(
        """
        const [text, done] = arguments;
        const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
        import('./playground/audio.js').then(async ({ decode, padded, wavBlob }) => {
          const sound = await decode(new Blob([bytes]), 44100);
          const made = new Uint8Array(await wavBlob(padded(sound, 0.25, 0.5)).arrayBuffer());
          done(btoa(made.reduce((text, byte) => text + String.fromCharCode(byte), '')));
        });
        """,
        b64encode(audio).decode(),
    )
    made, rate_hz = soundfile.read(io.BytesIO(b64decode(encoded)))
    source, _ = soundfile.read(io.BytesIO(audio))
    assert (rate_hz, len(made)) == (44100, round(1.25 * 44100))
    np.testing.assert_array_equal(made[11025 : 11025 + 22050], source)
    assert not made[:11025].any()
    assert not made[11025 + 22050 :].any()
