"""Examples in front of a question, as a document whose shots are named parts."""

from collections.abc import Sequence

from kvtrim.prompts.document import SHOTS, Document

BETWEEN = "\n\n"  # what lm-evaluation-harness puts behind each example


def document(shots: Sequence[str], before: str = "", between: str = BETWEEN) -> Document:
    """What stands before the examples, and each example with what is between them behind it."""
    text, spans = before, []
    for shot in shots:
        spans.append((len(text), len(text) + len(shot)))
        text += shot + between
    return Document(text, {SHOTS: spans} if spans else {})
