"""Texts of facts that nothing foretells, drawn from a seed: what a cut must not lose.

Prose and code seldom hold a code, a number or a pair of words that is said once and asked for
later; documents that people ask questions about do. Every maker writes texts of at least so many
characters.
"""

import random
import string
import uuid
from collections.abc import Callable, Sequence

Maker = Callable[[random.Random, int, Sequence[str]], str]

FIRST = (
    "Maren Tobias Yusuf Odile Rafael Signe Hanako Luca Petra Emeka Noor Callum Ines Viktor Wanda"
)
LAST = (
    "Abel Brandt Cho Duarte Eriksen Faraday Gupta Hollis Ivanov Jansen Kato Lindqvist Moreau Nwosu"
)
PLACES = (
    "harbour archive cellar greenhouse workshop chapel granary boathouse observatory stable mill "
    "pavilion library kitchen armoury"
)
QUALITIES = (
    "blue heavy early round narrow bright second sour empty northern woollen copper clever damp "
    "patient striped famous"
)
THINGS = (
    "barrel kettle bishop ribbon canoe turnip hammer parrot cushion engine walnut mirror carpet "
    "whistle plough guitar candle otter"
)
KINDS = (
    ("locker", "opens with", "number"),
    ("account", "was opened under", "uuid"),
    ("parcel", "carries the label", "code"),
    ("wagon", "was given the name", "words"),
    ("telephone", "answers to", "phone"),
    ("office", "is reached at", "mail"),
    ("ledger", "closed at", "money"),
    ("meeting", "was moved to", "date"),
    ("door", "says", "words"),
    ("sample", "weighed", "weight"),
)
FILLER = (
    "It had rained since the morning and the road was wet. Nobody was in a hurry. The clerk wrote "
    "the list again and put it away.",
    "Trains came and went. The signal stood at red for a while, then at green. People looked at "
    "the clock and waited.",
    "Bread is made of flour, water, salt and time. The dough rests. The oven is warm.",
    "The sea was calm. A boat lay at the pier. Somebody mended a net and somebody else watched.",
)


def facts(characters: int, draw: random.Random, prose: Sequence[str]) -> dict[str, str]:
    """One text of every kind, by name.

    Args:
        characters: how long each is at least.
        prose: texts that facts are scattered over.
    """
    return {name: make(draw, characters, prose) for name, make in MAKERS.items()}


def _value(draw: random.Random, kind: str) -> str:
    letters = string.ascii_uppercase + string.digits
    made: dict[str, Callable[[], str]] = {
        "number": lambda: str(draw.randrange(10**4, 10 ** draw.choice((5, 6, 7, 8)))),
        "uuid": lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)),
        "code": lambda: "-".join(
            "".join(draw.choice(letters) for _ in range(draw.randrange(2, 6))) for _ in range(2)
        ),
        "words": lambda: f"{draw.choice(QUALITIES.split())} {draw.choice(THINGS.split())}",
        "phone": lambda: f"+{draw.randrange(1, 99)} {draw.randrange(10**6, 10**9)}",
        "mail": lambda: f"{draw.choice(LAST.split()).lower()}{draw.randrange(99)}@example.org",
        "money": lambda: (
            f"{draw.randrange(1, 999)},{draw.randrange(100, 999)}.{draw.randrange(99):02}"
        ),
        "date": lambda: (
            f"{draw.randrange(1, 29)}.{draw.randrange(1, 13)}.{draw.randrange(1890, 2090)}"
        ),
        "weight": lambda: f"{draw.uniform(0.1, 90):.3f} grams",
    }
    return made[kind]()


def _who(draw: random.Random) -> str:
    return f"{draw.choice(FIRST.split())} {draw.choice(LAST.split())}"


def _fact(draw: random.Random) -> str:
    thing, says, kind = draw.choice(KINDS)
    value = _value(draw, kind)
    owner = draw.choice((_who(draw), f"the {draw.choice(PLACES.split())}"))
    where = f"the {draw.choice(QUALITIES.split())} {draw.choice(PLACES.split())}"
    return draw.choice(
        (
            f"The {thing} of {owner} {says} {value}.",
            f"Note for {owner}: {thing} in {where} {says} {value}.",
            f"As {_who(draw)} remembers it, the {thing} near {where} {says} {value}.",
            f"{value} is what the {thing} of {owner} {says}.",
        )
    )


def _fill(characters: int, lines: Callable[[int], str], joint: str = "\n") -> str:
    found: list[str] = []
    size = 0
    while size < characters:
        found.append(lines(len(found)))
        size += len(found[-1]) + len(joint)
    return joint.join(found)


def _pairs(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    kind, sign = draw.choice(KINDS)[2], draw.choice((": ", " = ", " -> ", "\t"))

    def key(_: int) -> str:
        return f"{draw.choice(QUALITIES.split())}-{draw.choice(THINGS.split())}"

    return _fill(characters, lambda number: f"{key(number)}{sign}{_value(draw, kind)}")


def _statements(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    return _fill(characters, lambda _: _fact(draw), " ")


def _scatter(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Facts between the sentences of a text, one after every few."""
    text = draw.choice(list(prose)) if prose else " ".join(FILLER)
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ") if part.strip()]

    def piece(number: int) -> str:
        if number % 6 == 5:
            return _fact(draw)
        return sentences[(number - number // 6) % len(sentences)].rstrip(".") + "."

    return _fill(characters, piece, " ")


def _repeat(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """A few sentences over and over, and now and then a fact."""
    filler, every = draw.choice(FILLER), draw.choice((3, 5, 8))
    return _fill(characters, lambda number: _fact(draw) if number % every == every - 1 else filler)


def _chains(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Names that are given the value of other names, between repeated sentences."""
    filler, names = draw.choice(FILLER), [f"{draw.randrange(100, 999)}"]

    def line(number: int) -> str:
        if number % 3:
            return filler
        own = "".join(draw.choice(string.ascii_uppercase) for _ in range(4))
        names.append(own)
        before = names[-2] if draw.random() < 0.8 else f"{draw.randrange(1000, 99999)}"
        return f"{own} := {before}"

    return _fill(characters, line)


def _number(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Words in a numbered list, a few of them much oftener than the others."""
    words = [*QUALITIES.split(), *THINGS.split(), *PLACES.split()]
    often = draw.sample(words, 6)

    def item(number: int) -> str:
        return f"{number + 1}. {draw.choice(often if draw.random() < 0.4 else words)}"

    return _fill(characters, item, draw.choice(("\n", " ", "; ")))


def _letters(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Short invented words."""
    pool = ["".join(draw.choice(string.ascii_lowercase) for _ in range(5)) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(pool))]
    return _fill(characters, lambda _: draw.choices(pool, weights)[0], " ")


def _passages(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Short documents with a title each, of text and facts."""
    text = " ".join(prose) if prose else " ".join(FILLER)
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ") if part.strip()]

    def passage(number: int) -> str:
        start = draw.randrange(max(1, len(sentences) - 4))
        body = ". ".join(sentences[start : start + 4])
        title = f"{draw.choice(QUALITIES.split())} {draw.choice(PLACES.split())}".title()
        return f"[{number + 1}] {title}\n{body}. {_fact(draw)}\n"

    return _fill(characters, passage)


def _examples(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """Questions with their answers, one after the other."""

    def example(number: int) -> str:
        thing, says, kind = draw.choice(KINDS)
        who, value = _who(draw), _value(draw, kind)
        return f"Q: Whose {thing} {says} {value}?\nA: {who}'s.\n"

    return _fill(characters, example)


def _talk(draw: random.Random, characters: int, prose: Sequence[str]) -> str:
    """People who write to each other about times, places and numbers."""
    one, other = draw.sample(FIRST.split(), 2)

    def line(number: int) -> str:
        asked = (
            f"When do we meet {draw.choice(FIRST.split())}?",
            f"Did you bring the {draw.choice(THINGS.split())}?",
            "What was it again?",
            "ok, thanks :)",
        )
        fact = _fact(draw)
        told = (
            f"On {_value(draw, 'date')}, at the {draw.choice(PLACES.split())}.",
            f"No, but {fact[0].lower()}{fact[1:]}",
            f"It is {_value(draw, draw.choice(KINDS)[2])}, I wrote it down.",
        )
        return f"{(one, other)[number % 2]}: {draw.choice((asked, told)[number % 2])}"

    return _fill(characters, line)


MAKERS: dict[str, Maker] = {
    "pairs": _pairs,
    "scattered": _scatter,
    "repeated": _repeat,
    "statements": _statements,
    "passages": _passages,
    "chains": _chains,
    "talk": _talk,
    "numbered": _number,
    "examples": _examples,
    "letters": _letters,
}
