"""The page of what was kept in a real browser: what it shows is what was packed."""

from itertools import pairwise

import numpy as np
import pytest

from browser import WIDTHS, fits, opened, picture, settle
from kvtrim.report.viewer import evidence
from kvtrim.report.viewer.exhibit import Exhibit, Said, Stop

pytestmark = pytest.mark.process
WORDS = "The keeper of the old lighthouse said <b>purple</b> elephant & left at dawn .".split()
PIECES = [f" {word}" if n % 13 else f"\n{word}" for n, word in enumerate(WORDS * 100)]
HOSTILE = ["\x1b[31m", "\u202e", "", "🙂", "</script>"]
PIECES[40:45] = HOSTILE
TOKENS, LAYERS, HEADS = len(PIECES), 6, 2


def heads(share, seed):
    generator = np.random.default_rng(seed)
    order = [np.argsort(generator.random(TOKENS)) for _ in range(LAYERS * HEADS)]
    kept = [np.sort(each[: int(share * TOKENS)]) for each in order]
    return [kept[n : n + HEADS] for n in range(0, len(kept), HEADS)]


@pytest.fixture(scope="module")
def exhibit():
    everything = [[np.arange(TOKENS)] * HEADS] * LAYERS
    stops = [Stop("full", "all", everything, 100, 100, None, Said("purple elephant", -0.5))]
    for seed, name in enumerate(("snapkv", "knorm")):
        for keep, share in (("12.5%", 1 / 8), ("50%", 1 / 2)):
            said = Said(f"<i>{name}</i>", -9.5)
            stops.append(Stop(name, keep, heads(share, seed), 50, 100, "a remark", said))
    marks = evidence.find(PIECES, ["</b> elephant & left"])[:3]
    return Exhibit(
        PIECES, stops, ["Question-agnostic."], range(LAYERS), "Which?", "purple elephant", marks
    )


@pytest.fixture(params=WIDTHS)
def page(request, exhibit, tmp_path, chromium):
    exhibit.save(tmp_path / "kept.html")
    foreign = []
    with opened(chromium, WIDTHS[request.param]) as (page, faults):
        page.on("request", lambda r: r.url.startswith("file:") or foreign.append(r.url))
        page.goto((tmp_path / "kept.html").as_uri())
        page.wait_for_selector("html[data-drawn]")
        page.name = request.param
        yield page
        assert not faults and not foreign and fits(page)


def shares(page, number=0):
    """The share of the chosen heads that keep each token, as the page has it."""
    return page.evaluate(f"Array.from(panes[{number}].found, n => n / panes[{number}].heads)")


def by_hand(stop, layer=None, head=None):
    chosen = stop.heads if layer is None else stop.positions[layer]
    chosen = chosen if head is None else [chosen[head]]
    found = np.zeros(TOKENS)
    for each in chosen:
        found[each] += 1 / len(chosen)
    return found


def stop_of(exhibit, method, keep):
    return next(each for each in exhibit.stops if (each.method, each.keep) == (method, keep))


def test_every_choice_shows_what_was_kept(page, exhibit):
    small, large = (stop_of(exhibit, "snapkv", keep) for keep in ("12.5%", "50%"))
    assert shares(page) == pytest.approx(by_hand(small))
    assert shares(page, 1) == pytest.approx(by_hand(stop_of(exhibit, "knorm", "12.5%")))
    picture(page, f"view-{page.name}", full_page=True)
    page.locator("#budget").fill("1")
    settle(page, "panes[0].stop.keep === '50%' && panes[1].stop.keep === '50%'")
    assert shares(page) == pytest.approx(by_hand(large)) and page.inner_text("#keep") == "50%"
    page.select_option("#beside", "")
    settle(page, "panes.length === 1")
    grid = page.locator(".grid")
    grid.get_by_role("button", name="layer 3", exact=True).click()
    settle(page, "panes[0].heads === 2")
    assert shares(page) == pytest.approx(by_hand(large, 3))
    assert page.inner_text("#choice") == "layer 3"
    grid.get_by_role("button", name="layer 3, head 1").click()
    settle(page, "panes[0].heads === 1")
    assert shares(page) == pytest.approx(by_hand(large, 3, 1))
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    settle(page, "choice.head === 0")
    assert shares(page) == pytest.approx(by_hand(large, 3, 0))
    page.click("#all")
    settle(page, "choice.layer === null")
    page.select_option("#method", "full")
    settle(page, "panes[0].name === 'full'")
    assert set(shares(page)) == {1.0}
    all_of_it = f"layer 3, head 0: {TOKENS:,} of {TOKENS:,} tokens kept"
    assert page.inner_text("#token") == all_of_it  # said anew for what is shown now
    picture(page, f"view-full-{page.name}", full_page=True)


def test_the_text_is_text_and_shaded_token_by_token(page, exhibit):
    page.select_option("#beside", "")
    settle(page, "panes.length === 1")
    small = by_hand(stop_of(exhibit, "snapkv", "12.5%"))
    spans = page.eval_on_selector_all(
        ".part.one b", "all => all.filter(b => b.from !== undefined)"
        ".map(b => [b.from, b.to, b.textContent, b.classList.contains('gone')])",
    )  # fmt: skip
    assert len(spans) > 200 and spans[0][0] == 0
    for (start, end, text, gone), (after, *_) in pairwise(spans):
        assert end == after and gone is bool(small[start:end].max() == 0)
        if not {*HOSTILE} & {*PIECES[start:end]}:
            assert text == "".join(PIECES[start:end])
    texts = [text for *_, text, _ in spans]
    assert {"\\x1b[31m", "\\u202e", "🙂", "</script>", " <b>purple</b>"} <= {*texts}
    assert page.locator("#text b b, #text script, #rows i").count() == 0


def test_a_long_text_is_dressed_where_it_is_looked_at(page):
    assert page.evaluate("blocks.some(block => !block.dressed)")
    page.evaluate("at('text').scrollTop = at('text').scrollHeight")
    settle(page, "blocks[blocks.length - 1].dressed === version")
    page.locator("#text .part b").last.click()
    assert f"token {TOKENS - 1} " in page.inner_text("#token")


def test_evidence_is_marked_and_found(page):
    places = page.locator("#places li")
    assert places.count() == 3
    places.nth(2).get_by_role("button").click()
    assert page.inner_text("#token").startswith("token 35 ")
    picture(page, f"view-evidence-{page.name}")
    shown = [text for text in places.all_inner_texts() if "snapkv" in text]
    assert len(shown) == 3
    page.select_option("#method", "full")
    page.select_option("#beside", "")
    settle(page, "panes.length === 1 && panes[0].name === 'full'")
    assert all("0 of 4 lost" in text for text in places.all_inner_texts())
    assert "full: 100 % of 12 heads" in page.inner_text("#token")


def test_answers_stand_under_it(page):
    rows = page.locator("#rows tr")
    assert rows.count() == 5 and page.inner_text("#question") == "Which?"
    assert "-9.50" in rows.nth(1).inner_text() and "<i>snapkv</i>" in rows.nth(1).inner_text()
    assert page.locator("#rows tr.now").count() == 2
    assert page.locator("#remarks li").count() == 4
