"""Jobs: followed, cancelled, found again; and what the server says of itself."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.by import By

from tests.playground.conftest import Page

pytestmark = pytest.mark.server


def test_jobs_outlive_a_reload_and_can_be_cancelled(page: Page) -> None:
    page.fill(prompt="rain", duration=5, steps=50, batch_size=4)
    page.click("generate")
    jobs = page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs li")[3:])
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]"))
    assert jobs
    page.open()
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #takes li")[3:])
    for button in page.browser.find_elements(By.CSS_SELECTOR, "#jobs button"):
        page.run("arguments[0].click()", button)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    assert page["no-jobs"].is_displayed()
    page.messages()  # a job that had just ended could not be cancelled


@pytest.mark.slow
def test_many_jobs_leave_connections_for_everything_else(page: Page) -> None:
    """A browser has six to a server; a stream of events holds one as long as its job lasts."""
    page.fill(prompt="rain", duration=20, steps=50, batch_size=4)
    for count in (4, 8):
        page.click("generate")
        page.until(lambda count=count: len(page.browser.find_elements(By.CSS_SELECTOR, "#jobs li")) == count)
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]")[5:])
    script = "const [done] = arguments; fetch('v1/status').then((reply) => done(reply.status))"
    assert page.browser.execute_async_script(script) == 200
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "#jobs button")
    assert len(buttons) > 5
    for button in buttons:
        page.run("arguments[0].click()", button)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    page.messages()  # a job that had just ended could not be cancelled


@pytest.mark.slow
def test_the_jobs_that_have_no_stream_are_asked_for_one_after_another(page: Page) -> None:
    """However many there are: thousands may be left over from the page before."""
    asked_at_ms = page.browser.execute_async_script(
        """
        const [done] = arguments;
        const asked = [];
        window.fetch = async (url) => {
          if (!/jobs.[0-9]+$/.test(url)) return new Promise(() => {}); // streams, and the server panel's
          if (asked.push(performance.now()) === 8) done(asked);
          return Response.json({ status: "queued", progress: {} });
        };
        const follow = async (events) => { for await (const _ of events); };
        import("./playground/api.js").then(({ jobEvents }) => {
          for (let id = 0; id < 100; id += 1) follow(jobEvents(String(id)));
        });
        """
    )
    assert np.diff(asked_at_ms).min() > 200


@pytest.mark.slow
def test_a_take_whose_download_broke_is_fetched_after_a_reload(page: Page) -> None:
    page.run(
        """
        const real = window.fetch;
        const broken = () => new ReadableStream({ start: (stream) => stream.error(new TypeError("it broke")) });
        window.fetch = async (url, options) =>
          String(url).includes("/audio?") ? new Response(broken()) : real(url, options);
        """
    )
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page["form-error"].text.startswith("The connection was lost."))
    assert page.takes == []
    page.open()
    page.until(lambda: page.takes)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))


@pytest.mark.slow
def test_a_job_whose_acceptance_was_never_heard_of_is_found_again(page: Page, served: str) -> None:
    page.run(
        """
        const real = window.fetch;
        window.fetch = async (url, options) => {
          const reply = await real(url, options);
          if (!String(url).endsWith("/jobs")) return reply;
          window.accepted = true;
          return new Promise(() => {});
        };
        """
    )
    page.fill(prompt="a gong that nobody heard of", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.run("return window.accepted"))
    page.open()
    page.until(lambda: page.takes)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    jobs = httpx.get(f"{served}/jobs", params={"limit": 100}).json()["jobs"]
    assert len([job for job in jobs if "nobody heard of" in json.dumps(job)]) == 1


@pytest.mark.slow
def test_the_server_panel_asks_once_at_a_time_and_keeps_the_focus(page: Page) -> None:
    num_asked = page.browser.execute_async_script(
        """
        const [done] = arguments;
        const real = window.fetch;
        import("./playground/server_panel.js").then(({ ServerPanel }) => {
          const panel = new ServerPanel();
          let asked = 0;
          window.fetch = () => { asked += 1; return new Promise(() => {}); };
          for (let count = 0; count < 5; count += 1) panel.refresh();
          window.fetch = real;
          done(asked);
        });
        """
    )
    assert num_asked == 1
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#server-models td"))
    page.run(
        """
        document.querySelector(".scroll").focus();
        window.numDrawn = 0;
        const rows = document.getElementById("server-models");
        new MutationObserver(() => (numDrawn += 1)).observe(rows, { childList: true });
        """
    )
    page.until(lambda: page.run("return numDrawn"))
    assert page.run("return document.activeElement.className") == "scroll"
