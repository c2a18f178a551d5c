"""Reading what the code says of itself: docstrings of parts, comments after parameters.

A part (policy, budget, unit) is described by its class's docstring or, where a file holds one
part, by the file's: a sentence, then free text and labelled blocks.

    NAME: one sentence.

    Rule:  the formula in words,
           going on indented.
    Paper: ...
    Code:  ...
    Ours:  where it differs.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

_LABEL = re.compile(r"([A-Z][a-z]+):\s+(.*)")


@dataclass(frozen=True)
class Text:
    """A docstring taken apart."""

    summary: str  # its first sentence or sentences, on one line
    body: str  # what follows without a label, as it was written
    labels: Mapping[str, str]  # Rule, Paper, Code, Ours


@cache
def text_of(owner: type) -> Text:
    """The docstring of a class, or of its file if the class has none of its own."""
    own = owner.__doc__ or ""
    written_by_dataclass = own.startswith(f"{owner.__name__}(")
    module = inspect.getmodule(owner)
    given = (module.__doc__ if module else "") if written_by_dataclass or not own else own
    return _taken_apart(inspect.cleandoc(given or ""))


@cache
def meanings_of(owner: type) -> Mapping[str, str]:
    """What each parameter of a dataclass means: the comment after it, or the text under it.

    Parameters without either have the meaning that a base class gives them, if one does. Nothing
    is known where the source is not at hand.
    """
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        found |= dict(_meanings_in(source))
    return found


def _taken_apart(doc: str) -> Text:
    summary, body, labels, open_label = [], [], {}, ""
    lines = doc.splitlines()
    while lines and lines[0].strip() and (not summary or not _LABEL.match(lines[0])):
        summary.append(lines.pop(0).strip())
    for line in lines:
        match = _LABEL.match(line)
        if match:
            open_label = match[1]
            labels[open_label] = " ".join(filter(None, [labels.get(open_label), match[2]]))
        elif open_label and line.strip():
            labels[open_label] += " " + line.strip()
        else:
            open_label = ""
            body.append(line)
    return Text(" ".join(summary), "\n".join(body).strip(), labels)


def _meanings_in(source: str) -> Iterator[tuple[str, str]]:
    """(parameter, meaning) for every annotated name in the class that the source defines."""
    (definition,) = ast.parse(source).body
    comments, alone = _comments(source)
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        line = node.end_lineno or 0
        said = [comments[line]] if line in comments else []
        while said and line + 1 in alone:  # a comment may go on below
            line += 1
            said.append(comments[line])
        if not said and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said = str(after.value.value).split()
            said[:1] = [said[0][:1].lower() + said[0][1:]]
        if said:
            yield node.target.id, " ".join(said).rstrip(".")


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """The comment on each line, and the lines that hold nothing else."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                alone.add(token.start[0])
    return comments, alone
