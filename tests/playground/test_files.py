"""Files of clips that the playground page downloads, and files written by commands that are copied from the page."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.patience import PATIENCE_S
from tests.playground.conftest import Page

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2] / "stable_audio_serve" / "api" / "playground"


@pytest.mark.slow
def test_clip_is_downloaded_in_the_selected_format(page: Page, served: str, tmp_path: Path) -> None:
    page.fill(prompt="a snare", duration=0.5, steps=2, seed=5).make_clip()
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    body = {"prompt": "a snare", "model": "demo", "duration": 0.5, "steps": 2, "seed": 5}
    for name, fields in {
        "WAV": {"response_format": "wav"},
        "FLAC": {"response_format": "flac"},
        "MP3": {"response_format": "mp3"},
        "WAV 24-bit": {"response_format": "wav", "bit_depth": 24},
    }.items():
        Select(page["format"]).select_by_visible_text(name)
        file = tmp_path / f"a-snare-5.{fields['response_format']}"
        file.unlink(missing_ok=True)
        page.click("download")
        page.until(file.exists)
        reply = httpx.post(f"{served}/v1/audio/generations", json=body | fields, timeout=PATIENCE_S)
        page.until(lambda file=file, reply=reply: file.read_bytes() == reply.content)
        assert page.status_text == ""
    page.run("window.fetch = async () => new Response('', { status: 500 })")
    page.click("download")
    page.until(lambda: page["form-error"].text == "The server responded with status 500.")
    assert page.status_text == ""


def copy(page: Page, kind: str) -> str:
    """Press the copy button of this kind, such as "curl". Returns the text in the clipboard."""
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    page.run("document.getElementById('said').textContent = ''")
    page.run("arguments[0].click()", page.browser.find_element(By.CSS_SELECTOR, f"[data-copy={kind}]"))
    page.until(lambda: page.status_text == "Copied.")
    script = "const [done] = arguments; navigator.clipboard.readText().then(done)"
    text: str = page.browser.execute_async_script(script)
    return text


def run_copied(page: Page, folder: Path) -> list[bytes]:
    """Copy the curl command and the Python program of the shown clip, and run both in the folder.

    Returns the contents of the files that they write.
    """
    made = []
    for command in (["bash", "-c", copy(page, "curl")], [sys.executable, "-c", copy(page, "python")]):
        path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT.parents[2])}
        subprocess.run(command, cwd=folder, check=True, env=path)
        made.append((folder / "clip.wav").read_bytes())
        (folder / "clip.wav").unlink()
    return made


@pytest.mark.slow
def test_copied_commands_give_the_same_file(page: Page, served: str, tmp_path: Path) -> None:
    page.fill(prompt='it\'s a "snare"', duration=0.5, steps=2, seed=5).make_clip()
    recipe = json.loads(copy(page, "json"))
    assert (recipe["seed"], recipe["prompt"]) == (5, 'it\'s a "snare"')
    body = {"prompt": 'it\'s a "snare"', "model": "demo", "duration": 0.5, "steps": 2, "seed": 5}
    made = [
        httpx.post(f"{served}/v1/audio/replay", json=recipe, timeout=PATIENCE_S).content,
        httpx.post(f"{served}/v1/audio/generations", json=body, timeout=PATIENCE_S).content,
    ]
    assert [*made, *run_copied(page, tmp_path)] == [made[0]] * 4


def kept_audio(page: Page) -> tuple[bytes, str, bytes]:
    """Returns the file of the shown clip, and the name and content of the clip's source file."""
    files = page.browser.execute_async_script(
        """
        const [id, done] = arguments;
        const text = async (blob) => {
          const bytes = new Uint8Array(await blob.arrayBuffer());
          return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
        };
        import("./playground/store.js").then(async (store) => {
          await store.open();
          const { blob, order } = (await store.all("takes")).find((clip) => clip.id === id);
          const source = order.source ?? new File([], "");
          done([await text(blob), source.name, await text(source)]);
        });
        """,
        page.shown,
    )
    return b64decode(files[0]), files[1], b64decode(files[2])


@pytest.mark.slow
def test_copied_commands_of_edits_and_loops_give_the_same_file(page: Page, tmp_path: Path) -> None:
    def expect_the_same() -> tuple[bytes, bytes]:
        """Check that each copied command of the shown clip writes a file that equals the clip's file.

        Returns the clip's file and its source file.
        """
        made, name, source = kept_audio(page)
        (tmp_path / name).write_bytes(source)
        assert run_copied(page, tmp_path) == [made] * 2
        return made, source

    page.fill(prompt="a snare", duration=0.5, steps=2).make_clip()
    page.click("use-source")
    page.fill(prompt='a "door"', init_noise_level=0.5).make_clip()
    varied, _ = expect_the_same()
    page.click("mark-region")
    page.make_clip("regenerate")
    _, source = expect_the_same()
    assert source == varied
    page.click("extend-before")
    page.make_clip("regenerate")
    expect_the_same()
    page.browser.find_element(By.CSS_SELECTOR, "input[value=loop]").click()
    made = page.fill(bpm=240, bars=1).make_clip()
    assert run_copied(page, tmp_path) == [kept_audio(page)[0]] * 2
    assert made["order"].get("source") is None
