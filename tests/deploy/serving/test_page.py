"""The page, driven in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.deploy.serving.served import Served, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser.new_page()
        browser.close()


def test_request_in_query_and_results_out(server: Served, page: Page) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#task option")).to_have_count(5)
    page.fill("#request", "Does aspirin lower the risk of stroke?")
    page.click("#go")
    expect(page.locator("article")).to_have_count(1)
    assert page.locator("article code").inner_text().strip()
    expect(page.locator("article")).to_contain_text("result")
    page.fill("#n", "3")
    page.press("#request", "Control+Enter")
    expect(page.locator("article")).to_have_count(3)
    expect(page.locator("#state")).to_contain_text("s")
    assert problems == []


def test_what_goes_wrong_is_shown(server: Served, page: Page) -> None:
    page.goto(server.url)
    page.select_option("#task", "text_to_sql")
    expect(page.locator("#database-field")).to_be_visible()
    expect(page.locator("#search")).to_be_disabled()
    page.fill("#request", "How many customers?")
    page.fill("#database", "nowhere")
    page.click("#go")
    expect(page.locator("#problem")).to_contain_text("name of a database")
    page.select_option("#task", "publication_search")
    page.fill("#request", "long " * 400)
    page.click("#go")
    expect(page.locator("article .problem")).to_contain_text("actor.max_model_len")


def test_markup_in_a_request_stays_text(server: Served, page: Page) -> None:
    page.goto(server.url)
    found = {"refused": "", "columns": [], "rows": [], "warnings": [], "count": 1}
    hit = {"id": "1", "title": "<i>t</i>", "url": ""}
    rewrite = {"query": "<img src=x onerror=window.hit=1>", "reasoning": "<b>x</b>", "found": {**found, "hits": [hit]}}
    page.evaluate("rewrite => document.getElementById('results').append(card(rewrite))", rewrite)
    expect(page.locator("article code")).to_have_text("<img src=x onerror=window.hit=1>")
    assert page.locator("article img, article b, article i").count() == 0
    assert page.evaluate("window.hit") is None


def test_a_key_is_asked_for(model: Path, corpus: Path, tmp_path: Path, page: Page) -> None:
    with served(model, corpus, tmp_path / "log", "actor.engine=transformers", "--no-search", key="open") as running:
        page.goto(running.url)
        expect(page.locator("#problem")).to_contain_text("wants its key")
        page.fill("#key", "open")
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#request", "aspirin")
        page.click("#go")
        expect(page.locator("article code")).to_have_count(1)
