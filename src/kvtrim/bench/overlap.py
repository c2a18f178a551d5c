"""How many words of an expected text an answer has; strings only."""

import re
import string
from collections import Counter


def rouge1_recall(answer: str, expected: str) -> float:
    """Share of the expected words that the answer holds, each as often as it is expected.

    ROUGE-1 recall without stemming: lower case, letters and digits only.
    """
    have, want = _words(answer), _words(expected)
    return (have & want).total() / max(1, want.total())


def qa_f1(answer: str, expected: str) -> float:
    """F1 over words as SQuAD and LongBench count it: no case, punctuation or articles."""
    have, want = _plain(answer), _plain(expected)
    common = (have & want).total()
    return 2 * common / max(1, have.total() + want.total())


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W_]+", text.lower()))


def _plain(text: str) -> Counter[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(word for word in bare.split() if word not in ("a", "an", "the"))
