"""Browser: a headless Chromium, where the machine has one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
if find_spec("playwright") is None:
    MISSING = "needs the package playwright: pip install playwright"
elif CHROMIUM is None:
    MISSING = "needs Chromium on the PATH: apt-get install chromium"
else:
    from playwright.sync_api import Browser, sync_playwright

    MISSING = ""


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
