"""The page in a real browser, at a desktop's and a phone's width."""

import shutil
import signal

import pytest
from served import KEY, launch

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TEXT = "The cat sat on the mat and looked at the sea. " * 4


@pytest.fixture(scope="module")
def url(tmp_path_factory, model_folder):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    process, url = launch(tmp_path_factory.mktemp("served"), model_folder)
    yield url
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    process.wait(40)


@pytest.mark.parametrize("width", [1280, 360])
def test_every_button_does_what_it_says(url, width, tmp_path):
    (tmp_path / "my manual.txt").write_text(TEXT)
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = driver.chromium.launch(**options)
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(60_000)
        foreign, faults = [], []
        page.on("request", lambda r: r.url.startswith(url) or foreign.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.get_by_text("asks for an API key").wait_for()
        page.fill("#key", KEY)
        page.click("#unlock")
        page.locator("#locked").wait_for(state="hidden")
        page.set_input_files("#file", tmp_path / "my manual.txt")
        page.get_by_text("my-manual is ready").wait_for()
        assert page.input_value("#document").endswith("@my-manual")
        page.fill("#question", "<b>Who?</b>")
        page.click("#ask")
        figures = page.locator(".turn .figures").last
        playwright.expect(figures).to_contain_text("reused", timeout=60_000)
        assert page.locator(".turn .question").inner_text() == "<b>Who?</b>"  # text is text
        page.fill("#question", "Why?")
        page.keyboard.press("Enter")
        playwright.expect(page.locator(".turn")).to_have_count(2)
        page.locator("#stop").click()
        playwright.expect(page.locator("#ask")).to_be_enabled(timeout=60_000)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        page.screenshot(path=tmp_path / f"page-{width}.png")
        page.click("#fresh")
        playwright.expect(page.locator(".turn")).to_have_count(0)
        page.click("#remove")
        page.get_by_text("my-manual is removed").wait_for()
        assert "@" not in page.input_value("#document")
        browser.close()
        assert not foreign and not faults
