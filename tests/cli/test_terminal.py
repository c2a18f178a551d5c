"""On a terminal, text is text: markup is shown as it stands, and nothing acts on the terminal."""

import io
import json

import pytest

from kvtrim import cli
from kvtrim.cli import output

EVIL = "[/b] [bold]x[/bold] :smile: \x1b]0;pwned\x07 \x9b31m \u202e a\rb"


@pytest.fixture
def shown(monkeypatch):
    """Both streams as one, as a terminal with colours."""
    made = io.StringIO()
    for name in ("out", "err"):
        screen = output.Terminal(file=made, force_terminal=True, width=300, color_system=None)
        monkeypatch.setattr(output, name, screen)
    return made


def draw_progress():
    with output.progress() as report:
        report(EVIL, 1, 2)


def draw_busy():
    with output.busy(EVIL) as say:
        say(EVIL)


WAYS = {
    "print": lambda: output.out.print(EVIL),
    "styled": lambda: output.out.print(EVIL, style="bold"),
    "error": lambda: output.err.print(EVIL),
    "note": lambda: output.note(EVIL),
    "lines": lambda: output.lines([EVIL]),
    "title": lambda: output.table(EVIL, output.Cells.texts("a", [["x"]])),
    "cell": lambda: output.table("t", output.Cells.texts("a", [[EVIL]])),
    "facts": lambda: output.facts([("label", EVIL)]),
    "progress": draw_progress,
    "busy": draw_busy,
}


@pytest.mark.parametrize("way", WAYS)
def test_text_is_shown_as_it_stands_and_does_nothing(shown, way):
    WAYS[way]()
    text = shown.getvalue()
    joined = "".join(text.split())  # a title is broken to the width of its table
    assert "[/b][bold]x[/bold]:smile:" in joined and r"\x1b]0;pwned\x07" in joined
    assert not any(acting in text for acting in ("\x1b]0", "\x07", "\x9b", "\u202e", "a\rb"))


def test_json_for_machines_acts_on_nothing_and_says_the_same(capsys):
    output.print_json({"answer": EVIL + "\ud800 é"})
    printed = capsys.readouterr().out
    assert printed.strip().isprintable()
    assert json.loads(printed) == {"answer": EVIL + "\ud800 é"}


def test_errors_quote_harmlessly(capsys):
    with pytest.raises(SystemExit):
        cli._fail(f"no such file: {EVIL}", 2)
    printed = capsys.readouterr().err
    assert printed.startswith(r"kvtrim: no such file: [/b]") and printed.strip().isprintable()
