"""The page, in a real browser: Debian's Chromium, driven by Playwright.

``HASHEVICT_SCREENSHOTS=DIR`` keeps pictures of it, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.server import BUDGET, KEY, MODEL, Server

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.http,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium: apt-get install chromium"
    ),
]

WAIT_S = 60
MEASURES = Path(__file__).with_name("measures.js")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests may run as root, and then Chromium has no sandbox.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, just opened; no request of it may leave the server's host."""
    context = browser.new_context(viewport={"width": 1280, "height": 1500})
    page = context.new_page()
    hosts, faults = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        # Answers such as 404 are told as errors, and are none.
        lambda line: (
            line.type == "error"
            and "the server responded with a status of 4" not in line.text
            and faults.append(line.text)
        ),
    )
    page.set_default_timeout(1e3 * WAIT_S)
    page.add_init_script(path=MEASURES)
    page.goto(f"{server.url}/kv_policy/ui/")
    yield page
    assert hosts == {urlsplit(server.url).netloc}
    assert not faults, "the page's code failed, or broke its own security policy"
    context.close()


def until(page: Any, expression: str) -> None:
    """Wait for something; `wait_for_function` evaluates strings, which CSP forbids."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not so after {WAIT_S} s: {expression}"
        page.wait_for_timeout(100)


def keep(page: Any, name: str) -> None:
    """A screenshot, where somebody wants to see it."""
    if directory := os.environ.get("HASHEVICT_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def tab_to(page: Any, selector: str) -> None:
    """Press Tab until the element has the focus, as somebody without a mouse."""
    for _ in range(30):
        if page.evaluate(f"document.activeElement.matches({selector!r})"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {selector}")


def ask(page: Any, tokens: int, *budgets: int | str) -> None:
    """Give the key, take the example, send: by keyboard alone."""
    until(page, "document.activeElement.id == 'key'")  # 401 led here
    page.keyboard.type(KEY)
    tab_to(page, "#example")
    page.keyboard.press("Enter")
    until(page, f"document.getElementById('policy').textContent.startsWith('{MODEL}')")
    page.keyboard.press("Shift+Tab")  # to Send, over Stop, which is disabled
    for _ in range(8):
        if page.evaluate("document.activeElement.id == 'tokens'"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type(str(tokens))
    for number, budget in enumerate(budgets):
        tab_to(page, f"#budget-{number}")
        page.keyboard.type(str(budget))
    tab_to(page, "#send")
    page.keyboard.press("Enter")


def measure(page: Any, name: str, *arguments: Any) -> Any:
    """One of measures.js."""
    return page.evaluate(f"measures.{name}(...{json.dumps(arguments)})")


def test_text_is_shaded_while_it_streams_and_the_keyboard_is_enough(page: Any) -> None:
    ask(page, 1000)
    until(page, f"measures.count('written') > {BUDGET}")
    first, written = measure(page, "shares")[0], measure(page, "count", "written")
    until(page, f"measures.count('written') > {written + 16}")
    tab_to(page, ".text")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert "position 5: held by " in page.text_content(".said")
    page.keyboard.press("Home")
    until(page, "document.querySelector('.said').textContent.includes('votes')")
    later = measure(page, "shares")[0]
    assert len(later) > len(first), "the answer has grown"
    before_and_after = [
        pair for pair in zip(first, later, strict=False) if None not in pair
    ]
    assert any(after < before for before, after in before_and_after)
    assert min(after for _, after in before_and_after) < 0.5
    kept, written = (measure(page, "count", name) for name in ("kept", "written"))
    assert kept == BUDGET
    assert measure(page, "count", "evicted") == written - kept > 0
    assert measure(page, "count", "blocks") == BUDGET / 128
    assert measure(page, "colours", ".map") >= 3
    tab_to(page, ".map")
    assert "position 0: held by 90 of 90 heads" in page.text_content(".said")
    page.keyboard.press("ArrowRight")
    assert "position 1: held by 90 of 90 heads" in page.text_content(".said")
    tab_to(page, "summary")
    page.keyboard.press("Enter")
    assert "layer 29: heads 0" in page.inner_text(".list")
    keep(page, "keyboard")
    tab_to(page, "#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    assert not page.is_visible(".pane .error")


def test_two_budgets_of_one_prompt_differ_side_by_side(page: Any) -> None:
    ask(page, 1000, "full", 256)
    until(page, "measures.decoding()")
    tab_to(page, "#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    assert page.locator("h2").all_text_contents() == ["Budget full", "Budget 256"]
    for text in page.locator(".text").all():
        assert text.evaluate("it => it.scrollTop") > 0, "the answer is in sight"
    kept = page.locator('[data-count="kept"]').all_text_contents()
    written = page.locator('[data-count="written"]').all_text_contents()
    assert kept == [written[0], "256"]
    first, second = measure(page, "shares")
    prompt = page.locator(".pane").first.locator(".prompt").count()
    assert first[:prompt] == [1] * prompt
    assert sum(second[:prompt]) < 0.5 * prompt
    page.locator(".text").first.focus()
    page.keyboard.press("End")
    said = page.locator(".said").all_text_contents()
    assert len(said) == 2
    assert all("held by " in text for text in said), "both show the same position"
    boxes = [pane.bounding_box() for pane in page.locator(".pane").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    keep(page, "two-budgets")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_colour_schemes_and_on_a_phone(
    page: Any, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 375, "height": 800})
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, back[4:-1].split(","))) > 128) == (scheme == "light")
    for pair, ratio in measure(page, "contrasts").items():
        assert ratio >= 4.5, f"{pair}: WCAG 2.2, 1.4.3"
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    for button in page.query_selector_all("button"):
        assert button.bounding_box()["height"] >= 40, "large enough for a thumb"
    keep(page, f"phone-{scheme}")


def test_its_files_hold_no_data_and_forbid_everything_that_is_not_theirs(
    server: Server,
) -> None:
    redirect = httpx.get(
        f"{server.url}/v1/kv_policy/ui", headers={"Authorization": f"Bearer {KEY}"}
    )
    page = redirect.has_redirect_location and httpx.get(redirect.next_request.url)
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert MODEL not in page.text
    assert httpx.get(f"{server.url}/kv_policy/ui/../plugin.py").status_code == 404
