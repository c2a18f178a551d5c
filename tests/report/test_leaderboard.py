"""The leaderboard: every point, down to 1/32, opens its own samples."""

import re
from html.parser import HTMLParser

import pytest

from kvtrim.report import leaderboard, results
from report.synthetic import evaluation, speed

TASKS, METHODS, KEEPS = ("a", "b"), ("snapkv", "h2o"), ("32", "64", "512")


@pytest.fixture
def found(tmp_path):
    own = evaluation(tmp_path / "run", TASKS, METHODS, KEEPS, limit=5)
    return results.read_results([own, speed(tmp_path / "speed", METHODS, keep="64")])


def links(page):
    return set(re.findall(r'href="#([\w-]+)"', page))


def test_every_point_opens_the_samples_it_was_made_of(found):
    page = leaderboard.page(*found)
    ids = re.findall(r'<details id="([\w-]+)">', page)
    assert len(ids) == len(set(ids)) == 1 + len(METHODS) * len(KEEPS) and links(page) == set(ids)
    assert page.count("</title></a>") == len(ids)  # points
    for part in page.split("<details")[1:]:
        assert part.count('<tr><td class="left">') == len(TASKS) * 5
    (own,) = [part for part in page.split("<details")[1:] if "snapkv 64:" in part]
    shown = [int(text) for text in re.findall(r'<td class="left">\d</td><td>(\d+)</td>', own)]
    lines = [line for line in found[0][0].lines if (line.method, line.keep) == ("snapkv", "64")]
    assert sorted(shown) == sorted(round(100 * line.score) for line in lines)


def test_the_axis_reaches_a_thirty_second_and_further_where_measured(found, tmp_path):
    page = leaderboard.page(*found)  # 32 of 2,000 entries
    assert ">1/32</text>" in page and ">1/128</text>" not in page
    large = evaluation(tmp_path / "large", TASKS, METHODS, ("1000",), limit=2)
    assert ">1/32</text>" in leaderboard.page(*results.read_results([large]))


def test_seconds_stand_beside_where_they_were_measured(found):
    assert "<th>first token</th>" in leaderboard.page(*found)
    assert "first token" not in leaderboard.page(found[0])


def test_a_page_of_foreign_text_is_whole(tmp_path):
    bad = "<script>x</script>&"
    own = evaluation(tmp_path / "run", (bad,), METHODS, ("64",), model=bad)
    lines = (own / "samples.jsonl").read_text()
    (own / "samples.jsonl").write_text(lines.replace('"answer": ""', '"answer": "<b>\\u0007"'))
    page = leaderboard.page(*results.read_results([own]))
    assert bad not in page and "&lt;b&gt;\\x07" in page
    opened = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "line", "circle", "rect", "polyline", "input"):
                opened.append(tag)

        def handle_endtag(self, tag):
            if tag in opened:
                assert opened.pop() == tag

    Balance().feed(page)
    assert opened == []
