"""A headless Chromium for the tests of pages; they are skipped where there is none."""

import os
import shutil
import time
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
WIDTHS = {"desktop": 1280, "phone": 360}
PICTURES = "KVTRIM_SCREENSHOTS"  # a folder for screenshots, to look at


@contextmanager
def started():
    """A browser, for as many tests as there are: starting it takes longer than a page."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with driver.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, width, **context):
    """A page of that width that shares nothing with others, and what it did that it should not."""
    page = browser.new_page(viewport={"width": width, "height": 800}, **context)
    page.set_default_timeout(12_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    yield page, faults
    page.close()


def settle(page, condition):
    """Wait until it holds; pages allow no `eval`, which the driver's own waiting needs."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"{condition} never held"
        page.wait_for_timeout(20)


def picture(page, name, **how):
    """A screenshot, where somebody wants to look at it."""
    if folder := os.environ.get(PICTURES):
        page.screenshot(path=os.path.join(folder, f"{name}.png"), **how)


def fits(page):
    """Nothing reaches beyond the width of the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
