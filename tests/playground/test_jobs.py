"""Jobs on the playground page (progress, cancellation, page reloads), and the panel about the server."""

from __future__ import annotations

import json

import httpx
import pytest
from selenium.webdriver.common.by import By

from tests.patience import PATIENCE_S
from tests.playground.conftest import Page
from tests.playground.test_stage import UNREACHED

pytestmark = pytest.mark.server


def cancel_all(page: Page) -> None:
    """Press all buttons of the jobs at once, because the rows of jobs that end are removed."""
    page.run("for (const button of document.querySelectorAll('#jobs button')) button.click()")
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    page.messages()  # cancelling an ended job logs a message


def test_jobs_survive_a_reload_and_can_be_cancelled(page: Page) -> None:
    page.fill(prompt="rain", duration=20, steps=50, batch_size=4)  # so long that no job ends
    page.click("generate")
    jobs = page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs li")[3:])
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]"))
    assert jobs
    page.open()
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs li, #clips li")[3:])
    cancel_all(page)


@pytest.mark.slow
def test_many_jobs_leave_connections_for_other_requests(page: Page) -> None:
    """A browser opens at most six connections to a server. A job's event stream uses one of them until the job ends."""
    page.fill(prompt="rain", duration=20, steps=50, batch_size=4)
    for count in (4, 8):
        page.click("generate")
        page.until(lambda count=count: len(page.browser.find_elements(By.CSS_SELECTOR, "#jobs li")) == count)
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs progress[value]")[5:])
    script = "const [done] = arguments; fetch('v1/status').then((reply) => done(reply.status))"
    assert page.browser.execute_async_script(script) == 200
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#jobs button")) > 5
    cancel_all(page)


@pytest.mark.slow
def test_jobs_without_a_stream_are_polled_in_turn(page: Page) -> None:
    """Only a few jobs are polled at once, because there may be thousands of jobs after a page reload."""
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
    assert asked_at_ms[-1] - asked_at_ms[0] > 7 * 200  # a late timer may bring two polls together


@pytest.mark.slow
def test_interrupted_download_is_fetched_after_a_reload(page: Page) -> None:
    page.run(
        r"""
        const real = window.fetch;
        const broken = () => new ReadableStream({ start: (stream) => stream.error(new TypeError("it broke")) });
        window.fetch = async (url, options) =>
          /\/audio([?]|$)/.test(String(url)) ? new Response(broken()) : real(url, options);
        """
    )
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#jobs .failed"))
    assert "The connection was lost." in page["jobs"].text
    assert page.clips == []
    page.open()
    page.until(lambda: page.clips)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))


@pytest.mark.slow
def test_lost_connection_to_a_job_is_shown_and_restored(page: Page) -> None:
    page.run(
        """
        const real = window.fetch;
        window.fetch = async (url, options) =>
          /jobs.[0-9a-f]{32}/.test(String(url)) && !window.isBack
            ? Response.json({ detail: "the server cannot answer now" }, { status: 503 })
            : real(url, options);
        """
    )
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "Connection lost. Retrying." in page["jobs"].text)
    page.run("window.isBack = true")
    page.until(lambda: page.clips)


def test_silent_stream_of_a_job_is_opened_again(page: Page) -> None:
    """The first event stream is silent, as a connection is that a proxy has dropped while the computer slept."""
    page.run(
        """
        const real = window.fetch;
        const wait = window.setTimeout;
        window.setTimeout = (act, delay) => wait(act, delay === 30000 ? 300 : delay);
        window.fetch = async (url, options) => {
          if (!String(url).endsWith("/events") || window.isSilent) return real(url, options);
          window.isSilent = true;
          return new Response(new ReadableStream());
        };
        """
    )
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.clips)
    assert page.run("return window.isSilent")


@pytest.mark.slow
def test_job_with_a_lost_response_is_found_after_a_reload(page: Page, served: str) -> None:
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
    page.fill(prompt="a gong with a lost response", duration=0.5, steps=2).click("generate")
    page.until(lambda: page.run("return window.accepted"))
    page.open()
    page.until(lambda: page.clips)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    jobs = httpx.get(f"{served}/jobs", params={"limit": 100}, timeout=PATIENCE_S).json()["jobs"]
    assert len([job for job in jobs if "a lost response" in json.dumps(job)]) == 1


@pytest.mark.slow
def test_waiting_order_that_one_tab_cancels_is_sent_by_no_tab(page: Page) -> None:
    prompt = "a gong that another tab cancels"
    page.run(UNREACHED)
    page.fill(prompt=prompt, duration=0.5, steps=2).click("generate")
    page.until(lambda: "Sent when it is back." in page["jobs"].text)
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": UNREACHED})
    page.open().until(lambda: "Sent when it is back." in page["jobs"].text)
    second = page.browser.current_window_handle
    page.browser.switch_to.window(first)
    page.browser.find_element(By.CSS_SELECTOR, "#jobs button").click()
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    page.browser.switch_to.window(second)
    page.until(lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#jobs li"))
    page.browser.close()
    page.browser.switch_to.window(first)


@pytest.mark.slow
def test_waiting_order_that_another_tab_sends_is_shown_by_both(page: Page) -> None:
    page.run(UNREACHED)
    page.fill(prompt="rain", duration=0.5, steps=2).click("generate")
    page.until(lambda: "Sent when it is back." in page["jobs"].text)
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    page.open().until(lambda: page["clip-name"].text == "rain")
    page.browser.close()
    page.browser.switch_to.window(first)
    page.run("window.isBack = true")
    page.until(lambda: page["clip-name"].text == "rain")
    assert len(page.clips) == 1


def test_server_panel_shows_models_and_jobs(page: Page) -> None:
    model = {"stage": "ready", "max_replicas": 3, "rows_per_step": 2.46, "backlog_s": 7.0, "requests_per_minute": 12}
    model["replicas"] = [{"device": "cuda:0"}, {"device": "cuda:1"}]
    jobs = {"queued": 4, "running": 1, "dead_letters": 2}
    status = {"status": "ok", "version": "1.2", "reasons": ["a reason"], "models": {"music": model}, "jobs": jobs}
    cells, facts = page.browser.execute_async_script(
        """
        const [status, done] = arguments;
        import("./playground/server_panel.js").then(({ ServerPanel }) => {
          new ServerPanel().draw(status);
          const cells = [...document.querySelectorAll("#server-models td")];
          done([cells.map((cell) => cell.textContent), document.getElementById("server-facts").textContent]);
        });
        """,
        status,
    )
    assert cells == ["music", "ready", "2 of 3", "cuda:0, cuda:1", "2.5", "7.0 s", "12"]
    assert facts == "Jobs: 4 queued, 1 running, 2 dead letters. Version 1.2. a reason"


@pytest.mark.slow
def test_server_panel_sends_one_request_at_a_time_and_keeps_focus(page: Page) -> None:
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
        document.getElementById("server").open = true;
        document.querySelector(".scroll").focus();
        window.numDrawn = 0;
        const rows = document.getElementById("server-models");
        new MutationObserver(() => (numDrawn += 1)).observe(rows, { childList: true });
        """
    )
    page.until(lambda: page.run("return numDrawn"))
    assert page.run("return document.activeElement.className") == "scroll"
