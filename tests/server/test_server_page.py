"""The page: in a browser, where there is one, and what it asks of the server everywhere."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Site, run_fake


def test_it_asks_nobody_else() -> None:
    async def test(site: Site) -> None:
        answer = await site.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
        assert not re.search(r"https?://|src=|@import|url\(", answer.text)
        assert "innerHTML" not in answer.text

    run_fake(test, web=True)


def test_it_is_there_if_asked_for() -> None:
    async def test(site: Site) -> None:
        assert (await site.get("/")).status_code == 404

    run_fake(test)


def test_what_it_asks_is_answered() -> None:
    """The requests that its script makes."""

    async def test(site: Site) -> None:
        names = [one["id"] for one in (await site.get("/v1/models")).json()["data"]]
        body = {
            "model": names[0], "messages": [{"role": "system", "content": "x"},
                                            {"role": "user", "content": "Hi"}],
            "stream": True, "logprobs": True, "top_logprobs": 4, "temperature": 0.7,
            "max_tokens": 500,
        }  # fmt: skip
        origin = {"origin": site.url}
        answer = await site.post("/v1/chat/completions", body, headers=origin)
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"top_logprobs"' in answer.text
        metrics = (await site.get("/metrics")).text
        for name in ("running", "queued", "cells_used", "cells_total"):
            assert re.search(rf"^triollama_{name} \d+$", metrics, re.MULTILINE)

    run_fake(test, web=True)


@pytest.fixture
def browser() -> Iterator[Any]:
    """A page of headless Chromium, where it is installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        yield page
        chromium.close()


@pytest.fixture
def url(tiny: Any) -> Iterator[str]:
    """Of a server with the page: of a model slow enough that an answer can be stopped."""
    model = tiny("llama", n_layer=16, n_embd=512, n_head=8, n_head_kv=8)
    command = [
        sys.executable, "-m", "triollama.server", str(model), "--web", "--port", "0",
        "--threads", "1", "--n-ctx", "2048", "--params", '{"ignore_eos": true, "seed": 1}',
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()


@pytest.mark.slow
def test_a_chat_in_a_browser(browser: Any, url: str) -> None:
    problems: list[str] = []
    asked: list[str] = []
    browser.on("pageerror", lambda error: problems.append(str(error)))
    browser.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    browser.on("request", lambda request: asked.append(request.url))
    browser.goto(url)
    browser.wait_for_load_state("networkidle")
    assert problems == []
    assert browser.locator("#model option").count() == 1
    assert not browser.is_visible("#key")

    def articles(kind: str) -> Any:
        return browser.locator(f"article.{kind} .text")

    def idle() -> None:
        browser.wait_for_selector("#stop:disabled")

    browser.fill("#max_tokens", "12")
    browser.fill("#say", "Hello <b>there</b>")
    browser.press("#say", "Enter")
    browser.wait_for_selector("article.assistant .token")
    idle()
    assert articles("user").all_inner_texts() == ["Hello <b>there</b>"]
    tokens = browser.locator("article.assistant .token")
    assert tokens.count() >= 5
    assert "hsla" in tokens.first.get_attribute("style") or "rgba" in (
        tokens.first.get_attribute("style")
    )
    assert "%" in tokens.first.get_attribute("title")
    first = articles("assistant").inner_text()

    # Another answer to the same.
    browser.click("article.assistant button:text('again')")
    idle()
    assert articles("assistant").count() == 1

    # Stop.
    browser.fill("#max_tokens", "1900")
    browser.fill("#say", "Go on")
    browser.click("#send")
    browser.locator("article.assistant").nth(1).wait_for()
    browser.wait_for_selector("article:last-child .token")
    browser.click("#stop")
    idle()
    stopped = browser.locator("article:last-child .token").count()
    assert 0 < stopped < 1900
    while b"\ntriollama_running 0\n" not in urllib.request.urlopen(f"{url}/metrics").read():
        pass

    # Fork, then edit in the branch alone.
    browser.locator("article.user button:text('fork')").first.click()
    assert browser.locator("#chats button").count() == 2
    browser.fill("#max_tokens", "5")
    browser.locator("article.user button:text('edit')").first.click()
    assert browser.input_value("#say") == "Hello <b>there</b>"
    browser.fill("#say", "Something else")
    browser.press("#say", "Enter")
    browser.wait_for_selector("article.assistant .token")
    idle()
    assert articles("user").all_inner_texts() == ["Something else"]
    browser.locator("#chats button").nth(1).click()
    assert articles("user").all_inner_texts() == ["Hello <b>there</b>", "Go on"]

    # What is refused is shown, and what was said is there after a reload.
    browser.fill("#temperature", "-1")
    browser.fill("#say", "Too cold")
    browser.press("#say", "Enter")
    browser.wait_for_selector("article.error")
    assert "temperature" in articles("error").inner_text()
    browser.reload()
    assert browser.locator("#chats button").count() == 2
    assert first
    assert {one.split("/")[2] for one in asked} == {url.split("/")[2]}
    refused = [text for text in problems if "400" not in text]
    assert refused == []
