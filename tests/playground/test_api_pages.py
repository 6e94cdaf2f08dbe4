"""The two pages that show the API description, /docs and /redoc, in Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from stable_audio_serve.core.keys import hash_key, make_key
from tests.playground.conftest import Page, serve

pytestmark = [pytest.mark.server, pytest.mark.slow]


def click(page: Page, selector: str) -> None:
    (element, *_) = page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, selector))
    page.run("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def status_of_models(page: Page) -> str:
    """Use the page's form to send `GET /v1/models`. Returns the status that the page shows."""
    block = "#operations-Server-list_models_v1_models_get"
    click(page, f"{block} .opblock-summary-control")
    click(page, f"{block} .try-out__btn")
    click(page, f"{block} .execute")
    found = f"{block} .live-responses-table tbody td.response-col_status"
    return page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, found))[0].text


def test_docs_send_the_entered_key_and_redoc_loads_local_files(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    key = make_key()
    (tmp_path / "keys").write_text(f"alice:{hash_key(key)}\n")
    with serve(api={"key_file": str(tmp_path / "keys")}) as url:
        page = Page(chromium, url)
        page.messages()
        page.browser.get(f"{url}/docs")
        page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, ".opblock-tag"))
        tags = page.run("return [...document.querySelectorAll('.opblock-tag')].map((each) => each.dataset.tag)")
        assert tags[0] == "Stable Audio 3"
        click(page, ".btn.authorize")
        click(page, ".auth-container input")
        page.browser.find_element(By.CSS_SELECTOR, ".auth-container input").send_keys(key, Keys.ENTER)
        click(page, ".btn-done")
        assert status_of_models(page).startswith("200")
        page.browser.get(f"{url}/redoc")
        page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "[data-section-id]"))
        page.until(lambda: "redocly" in page.browser.page_source)
        assert page.messages() == []
