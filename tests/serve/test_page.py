"""The server's page in a real browser, at a desktop's and a phone's width."""

import signal

import pytest
from served import KEY, launch, send

from browser import WIDTHS, fits, opened, picture, settle

pytestmark = pytest.mark.process
TEXT = "The cat sat on the mat and looked at the sea. " * 4


@pytest.fixture(scope="module")
def url(tmp_path_factory, model_folder):
    process, url = launch(tmp_path_factory.mktemp("served"), model_folder)
    yield url
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    process.wait(40)


@pytest.fixture(params=WIDTHS)
def page(request, url, chromium):
    foreign = []
    with opened(chromium, WIDTHS[request.param]) as (page, faults):
        page.on("request", lambda r: r.url.startswith(url) or foreign.append(r.url))
        page.goto(url)
        page.name = request.param
        page.get_by_text("asks for an API key").wait_for()
        page.fill("#key", "wrong-key-of-sorts")
        page.click("#unlock")
        page.get_by_text("asks for an API key").wait_for()
        page.fill("#key", KEY)
        page.click("#unlock")
        page.locator("#locked").wait_for(state="hidden")
        yield page
        assert fits(page)
        own = [each for each in faults if "Failed to load resource" not in each]  # asked for here
        assert not foreign and not own


def add(page, tmp_path, name):
    (tmp_path / f"{name}.txt").write_text(TEXT)
    page.set_input_files("#file", tmp_path / f"{name}.txt")


def done(page):
    settle(page, "running === null")


def test_a_document_is_added_asked_shown_and_removed(page, tmp_path):
    add(page, tmp_path, "my manual")
    page.get_by_text("my-manual is ready").wait_for()
    assert page.input_value("#document").endswith("@my-manual")
    page.fill("#question", "<b>Who?</b>")
    page.click("#ask")
    done(page)
    turn = page.locator(".turn")
    assert turn.locator(".question").inner_text() == "<b>Who?</b>"  # text is text
    figures = turn.locator(".figures").inner_text()
    assert "held of" in figures and "reused" in figures and "first token after" in figures
    page.fill("#question", "Why?")
    page.press("#question", "Enter")
    done(page)
    assert page.locator(".turn").count() == 2
    if page.locator(".figures.bad").count():  # longer than the model's window: to be mended
        assert page.input_value("#question") == "Why?"
    picture(page, f"page-{page.name}", full_page=True)
    page.click("#kept")
    kept = page.frame_locator("#shown iframe")
    kept.locator("html[data-drawn]").wait_for(state="attached")
    assert "The cat sat" in kept.locator("#text").inner_text()
    assert "48" in kept.locator("#panes h2").inner_text()
    assert page.get_attribute("#kept", "aria-expanded") == "true"
    picture(page, f"page-kept-{page.name}", full_page=True)
    page.click("#kept")
    assert page.locator("#shown iframe").count() == 0
    page.click("#fresh")
    assert page.locator(".turn").count() == 0
    page.click("#remove")
    page.get_by_text("my-manual is removed").wait_for()
    assert "@" not in page.input_value("#document")
    assert page.is_disabled("#kept") and page.is_disabled("#remove")


def test_an_answer_is_stopped_and_what_fails_is_said(page, url, tmp_path):
    page.fill("#question", "A long story? " * 6)
    # in one step, since a tiny model may be done before the next
    assert page.evaluate(
        """() => {
            const [ask, stop] = ["#ask", "#stop"].map(name => document.querySelector(name));
            ask.click();
            const seen = [ask.disabled, stop.disabled];
            stop.click();
            return seen;
        }"""
    ) == [True, False]
    done(page)
    assert page.is_enabled("#ask") and page.is_disabled("#stop")
    (tmp_path / "blank.txt").write_text("  ")
    page.set_input_files("#file", tmp_path / "blank.txt")
    page.locator("#state.bad").wait_for()
    add(page, tmp_path, "gone")
    page.get_by_text("gone is ready").wait_for()
    assert send(url, "DELETE", "/v1/documents/gone")[0] == 200
    page.click("#kept")
    page.locator("#state.bad", has_text="no document").wait_for()
    assert page.locator("#shown iframe").count() == 0


def test_a_file_is_dropped(page, url):
    page.evaluate(
        """text => {
        const data = new DataTransfer();
        data.items.add(new File([text], "dropped.txt", {type: "text/plain"}));
        const drop = document.getElementById("drop");
        for (const kind of ["dragover", "drop"])
            drop.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true}));
        }""",
        TEXT,
    )
    page.get_by_text("dropped is ready").wait_for()
    page.select_option("#document", index=0)
    assert page.is_disabled("#remove")
    assert send(url, "DELETE", "/v1/documents/dropped")[0] == 200
