"""Browser: a headless Chromium, where the machine has one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
if find_spec("playwright") is None:
    MISSING = "needs the package playwright: pip install playwright"
elif CHROMIUM is None:
    MISSING = "needs Chromium on the PATH: apt-get install chromium"
else:
    from playwright.sync_api import Browser, Page, expect, sync_playwright

    MISSING = ""
DEADLINE = 30.0
"""Seconds that a page may take to show something."""
if not MISSING:
    expect.set_options(timeout=1000 * DEADLINE)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Yield a headless browser; skip the test where there is none."""
    if MISSING:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def open_page(url: str, browser: "Browser | None" = None, **context: Any) -> Iterator["Page"]:
    """The page at a URL, in a fresh session (``context``: ``color_scheme``, ``viewport``, ``http_credentials``, ...).

    On the way out it asserts that the browser had nothing to complain of: no error, nothing that the policy forbids.
    """
    with ExitStack() as stack:
        browser = browser or stack.enter_context(chromium())
        session = browser.new_context(**context)
        stack.callback(session.close)
        page, complaints = session.new_page(), []
        page.set_default_timeout(1000 * DEADLINE)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        yield page
        # Chromium writes every answer that is not 2xx to the console, whatever the page makes of it.
        unexpected = [text for text in complaints if not text.startswith("Failed to load resource")]
        assert not unexpected, "\n".join(unexpected)


def send(page: "Page", prompt: str = "12 + 7 =") -> None:
    """Type a prompt into the playground and send it."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Send").click()
