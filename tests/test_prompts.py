"""Prompts as the chat template has them, or one error that says why not."""

import sys
import threading

import pytest

import kvtrim
from kvtrim.errors import UsageError
from kvtrim.prompts import encode, encode_context, encode_question, frame
from kvtrim.prompts.document import Document
from models import tokenizer

EACH = "{% for m in messages %}<{{m['role']}}>"
GOOD = {
    "plain": f"{EACH}{{{{ m['content'] }}}}{{% endfor %}}<a>",
    "trimmed": f"{EACH}{{{{ m['content'] | trim }}}}{{% endfor %}}<a>",
    "powers in text": f"{EACH}{{{{ m['content'] }}}}{{% endfor %}} 2 ** 99999999999 <a>",
    "system last": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages if m['role'] == 'system' %}[{{ m['content'] }}]{% endfor %}<a>",
}
BAD = {
    "raises": ("{{ raise_exception('no such role') }}", "fails: no such role"),
    "undefined": (f"{EACH}{{{{ m.nothing.at.all }}}}{{% endfor %}}", "fails"),
    "no template at all": ("{% for %}", "fails"),
    "divides by zero": ("{{ 1 // 0 }}", "fails"),
    "calls itself": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "fails",
    ),
    "computes for hours": ("{{ 9 ** 9 ** 9 }}", r"power \(\*\*\)"),
    "fills the memory": ("{{ 'a' * 1_000_000_000_000 }}", "above 10,000,000"),
    "fills it with blanks": ("{{ 'a' | center(1e12 | int) }}", "above 10,000,000"),
    "counts in hexadecimals": ("{{ 'a' * 0xffffffffff }}", "above 10,000,000"),
    "prints twice": (f"{EACH}{{{{ m.content }}}} + {{{{ m.content }}}}{{% endfor %}}", "2 times"),
    "prints thrice": (f"{EACH}{{{{ m['content'] * 3 }}}}{{% endfor %}}", "3 times"),
    "wants parts": (
        f"{EACH}{{% for p in m.content %}}{{{{ p.text }}}}{{% endfor %}}{{% endfor %}}",
        "alters",
    ),
    "quotes": (f"{EACH}{{{{ m['content'] | tojson }}}}{{% endfor %}}", "alters"),
    "escapes": (f"{EACH}{{{{ m['content'] | e }}}}{{% endfor %}}", "alters"),
    "upper case": (f"{EACH}{{{{ m['content'] | upper }}}}{{% endfor %}}", "alters"),
    "cuts": (f"{EACH}{{{{ m['content'][:5] }}}}{{% endfor %}}", "alters"),
    "one line": (f"{EACH}{{{{ m['content'].split() | join(' ') }}}}{{% endfor %}}", "alters"),
    "prints nothing": ("hello", "alters"),
}  # fmt: skip
ENDLESS = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops and prints": "{% for a in range(90000) %}{% for b in range(90000) %}{{ a }}"
    "{% endfor %}{% endfor %}",
    "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "doubles a text": "{% set n = namespace(t='x' * 1000) %}{% for a in range(60) %}"
    "{% set n.t = n.t ~ n.t %}{% endfor %}",
}


def speaking(template):
    own = tokenizer(chat=True)
    own.chat_template = template
    return own


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("system", [None, "be brief"])
def test_prompts_are_what_the_template_makes_of_them(name, system):
    own = speaking(GOOD[name])
    given = [{"role": "system", "content": system}] if system else []
    given.append({"role": "user", "content": 'a "small" <dog>.\n\nWho?'})
    wanted = own.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    around = frame(own, None, system)
    made = encode_context(own, around, 'a "small" <dog>.')
    made = made.with_question(encode_question(own, around, "Who?"))
    assert own.decode(made.ids) == wanted


@pytest.mark.parametrize("name", BAD)
def test_templates_that_do_not_print_the_message_once_are_refused(name):
    template, message = BAD[name]
    with pytest.raises(UsageError, match=message) as refused:
        frame(speaking(template))
    assert "--no-chat" in str(refused.value)
    assert frame(speaking(template), chat=False).between == "\n\n"


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_never_end_are_stopped(name, monkeypatch):
    monkeypatch.setattr("kvtrim.prompts.prompt._TEMPLATE_S", 0.2)
    with pytest.raises(UsageError, match=r"has not ended after|needs more than 1 GiB"):
        frame(speaking(ENDLESS[name]))


def test_templates_are_stopped_in_other_threads_and_tracing_is_as_before(monkeypatch):
    monkeypatch.setattr("kvtrim.prompts.prompt._TEMPLATE_S", 0.2)
    found, before = [], sys.gettrace()

    def run():
        try:
            frame(speaking(ENDLESS["loops"]))
        except UsageError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert len(found) == 1 and "has not ended" in found[0]
    frame(speaking(GOOD["plain"]))
    assert sys.gettrace() is before


def test_a_system_message_that_the_template_leaves_out_is_refused():
    own = speaking("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")
    assert frame(own).before == ""
    with pytest.raises(UsageError, match="ignores the system message"):
        frame(own, system="be brief")


@pytest.mark.parametrize("half", ["\ud800", "\udfff", "\udc80"])
def test_half_characters_are_refused_wherever_text_comes_in(llama, half):
    own, bad = tokenizer(chat=True), f"abc{half}def"
    ask = dict(keep=40, max_new_tokens=2)
    for what, call in (
        ("document", lambda: kvtrim.generate(llama, own, bad, "d?", **ask)),
        ("document", lambda: kvtrim.compress(llama, own, bad, keep=40)),
        ("document", lambda: Document(bad)),
        ("question", lambda: kvtrim.generate(llama, own, "a b c", bad, **ask)),
        ("question", lambda: kvtrim.generate(llama, own, "a b c", ["d?", bad], **ask)),
        ("system message", lambda: kvtrim.generate(llama, own, "a b", "d?", system=bad, **ask)),
    ):
        with pytest.raises(UsageError, match=f"the {what} holds half a character") as refused:
            call()
        assert f"U+{ord(half):04X}" in str(refused.value) and "character 3" in str(refused.value)
    assert Document("whole: \U0001f600").text


def test_a_prompt_by_hand_is_its_two_parts_one_behind_the_other():
    own = tokenizer(chat=True)
    whole = encode(own, frame(own), "a small dog.", "Who?")
    parts = (
        encode_context(own, frame(own), "a small dog."),
        encode_question(own, frame(own), "Who?"),
    )
    assert whole.ids == parts[0].ids + parts[1].ids and whole == parts[0].with_question(parts[1])
