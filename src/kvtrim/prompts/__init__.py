"""What is read: documents with named parts, where those lie, and their token ids."""

from kvtrim.prompts.prompt import (
    Frame,
    Prompt,
    Template,
    Words,
    cut_middle,
    encode,
    encode_context,
    encode_ends,
    encode_question,
    encode_text,
    frame,
    repeat_words,
)

__all__ = [
    "Frame",
    "Prompt",
    "Template",
    "Words",
    "cut_middle",
    "encode",
    "encode_context",
    "encode_ends",
    "encode_question",
    "encode_text",
    "frame",
    "repeat_words",
]
