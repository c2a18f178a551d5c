"""From a context and questions to answers under either protocol, with what it took."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch

from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import Progress, read, require_sampling, sampling_names, synchronize
from kvtrim.hf.generate import generate as run
from kvtrim.hf.models.architectures import window
from kvtrim.methods.method import Method
from kvtrim.methods.ranges import Some, check_arguments
from kvtrim.methods.request import Request
from kvtrim.methods.settings import split
from kvtrim.prompts import (
    Frame,
    Prompt,
    Template,
    Words,
    encode_context,
    encode_question,
    repeat_words,
)
from kvtrim.prompts.document import Document

Protocol = Literal["question-aware", "question-agnostic"]
AWARE: Protocol = "question-aware"
AGNOSTIC: Protocol = "question-agnostic"
Truncate = Literal["error", "middle"]

NEW_TOKENS = 128
"""Tokens of an answer, if nobody says how many it may have."""


@dataclass(frozen=True)
class Answer:
    """One answer, its times, and what the cache held when its first token was there."""

    text: str
    token_ids: list[int]
    ttft_s: float  # from the question (question-agnostic) or the whole prompt to the first token
    tpot_s: float | None  # per token after the first, capturing apart; None if there was one only
    prompt_tokens: int  # context and question, template included
    held_bytes: int  # measured from the store: K, V, positions and slack
    full_bytes: int  # what a full cache of the same tokens holds
    kept: list[list[int]]  # entries per layer and head
    remark: str | None  # what is held of the prompt, where that is clearly not what was asked for
    decoding: str  # "captured" (a replayed CUDA graph per token), or "plain" and why
    reused_tokens: int  # of the prompt's, those that a cache had read before the question came


@dataclass(frozen=True)
class Result:
    """Answers to one or several questions about one context.

    Single figures are the first answer's.
    """

    answers: list[Answer]
    protocol: Protocol
    method: str
    keep: str
    compress_s: float  # reading and compressing the context, where that was a step of its own

    @property
    def text(self) -> str:
        """The first answer."""
        return self.answers[0].text

    @property
    def texts(self) -> list[str]:
        """Every answer."""
        return [answer.text for answer in self.answers]

    @property
    def ttft_s(self) -> float:
        """Seconds from the prompt to the first token of the first answer, compression included."""
        return self.compress_s + self.answers[0].ttft_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first, over all answers; None if none had two."""
        pairs = [(a.tpot_s, len(a.token_ids) - 1) for a in self.answers if a.tpot_s is not None]
        steps = sum(count for _, count in pairs)
        return sum(tpot * count for tpot, count in pairs) / steps if steps else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the context and the first question."""
        return self.answers[0].prompt_tokens

    @property
    def read_tokens(self) -> int:
        """Prompt tokens read by this call: questions, and the context unless a cache had it."""
        asked = sum(answer.prompt_tokens - answer.reused_tokens for answer in self.answers)
        return asked + (self.answers[0].reused_tokens if self.compress_s else 0)

    @property
    def reused_tokens(self) -> int:
        """Context tokens that a cache had read before this call."""
        return 0 if self.compress_s else self.answers[0].reused_tokens

    @property
    def held_bytes(self) -> int:
        """Bytes the cache held when the first answer began."""
        return self.answers[0].held_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that a full cache held at that moment."""
        return self.answers[0].full_bytes

    @property
    def kept(self) -> list[list[int]]:
        """Entries per layer and head at that moment."""
        return self.answers[0].kept

    @property
    def remark(self) -> str | None:
        """What is held of the prompt and why, where that is clearly not what was asked for."""
        return next((answer.remark for answer in self.answers if answer.remark), None)


@check_arguments
def generate(
    model: Any,
    tokenizer: Any,
    context: str | Document | Cache,
    question: str | Sequence[str] = "",
    *,
    method: str | Method | Request = "auto",
    keep: int | float | str = 512,
    max_new_tokens: Some | None = None,
    protocol: Protocol | None = None,
    chat: bool | None = None,
    system: str | None = None,
    truncate: Truncate = "error",
    prefill_chunk: Some | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Answer one or several questions about a context with a small cache.

    Args:
        model, tokenizer: as `kvtrim.load` gives them; attached for the call if it is not already.
        context: the document, as text or as a `Document` with named parts, or a cache that
            `compress` or `load_cache` made of one.
        question: one question is read together with the context (question-aware) unless told
            otherwise; several are asked of one compressed context (question-agnostic), which each
            of them leaves as it found it.
        method, keep: what to evict, see `kvtrim.Cache`. A `Request` brings its budget and its
            parameters along. A ready cache has its own; other settings of how a context is read
            (parameters of the method, `system`, ...) are refused beside one.
        protocol: "question-aware" or "question-agnostic", to choose explicitly.
        chat: use the tokenizer's chat template; by default if it has one.
        system: a system message, for templates that have one.
        max_new_tokens: of each answer; by default what `generation_config` says, else 128.
        truncate: if the prompt exceeds the model's window, refuse it, or cut the context's middle.
        prefill_chunk: read the prompt in passes of at most so many tokens.
        progress: called as `progress(what, done, out_of)` while reading and answering.
        options: parameters of the method (`window=16`, `preset="kvpress"`), and whatever
            `model.generate` takes (`do_sample`, `num_beams`, `streamer`, `stop_strings`,
            `generation_config`, ...). Greedy unless they say otherwise, whatever the model's own
            configuration says.
            Where both have a name, `**{"policy.NAME": ...}` and `**{"sampling.NAME": ...}`.

    Raises:
        UsageError: an empty context, one longer than the model's window, or a wrong parameter.
        UnknownNameError: an option that nobody has.
    """
    questions = [question] if isinstance(question, str) else list(question)
    if not questions:
        raise UsageError("no question was given; pass one text or a list of them")
    named = method.method if isinstance(method, Request) else method
    settings, options = split(named, options, sampling_names()) if options else ({}, {})
    require_sampling(options)
    config = options.get("generation_config")
    new_tokens: int = max_new_tokens or (config and config.max_new_tokens) or NEW_TOKENS
    if options.get("stop_strings") or (config and config.stop_strings):
        options = {"tokenizer": tokenizer, **options}
    asking = {"max_new_tokens": new_tokens, "chunk": prefill_chunk, "progress": progress}
    asking |= options
    if isinstance(context, Cache):
        said = {"protocol": protocol == AWARE, "truncate": truncate != "error"}
        said |= {"chat": chat is not None, "system": system is not None}
        _require_unsaid(said | dict.fromkeys(settings, True))
        return _ask(model, tokenizer, context, questions, 0.0, asking)
    request = Request.of(method, keep, settings)
    if protocol is None:
        protocol = AWARE if len(questions) == 1 else AGNOSTIC
    request.method.require_passes(prefill_chunk)
    template = Template(chat, system)
    around = template.frame(tokenizer)
    follow = [encode_question(tokenizer, around, text) for text in questions]
    room = window(model) - new_tokens - max(map(len, follow))
    prompt = fit_context(tokenizer, around, context, room, truncate)
    if protocol == AGNOSTIC:
        start, reach = perf_counter(), len(prompt) + max(map(len, follow)) + new_tokens - 1
        cache = _empty(model, request, prompt, repeat_words(tokenizer, around), template)
        _read_context(model, cache, prompt, prefill_chunk, progress, reach)
        return _ask(model, tokenizer, cache, questions, perf_counter() - start, asking)
    answers, words, name = [], repeat_words(tokenizer, around), request.name
    for own in follow:
        whole = prompt.with_question(own)
        cache = _empty(model, request, whole, words, template)
        answers.append(answer(model, tokenizer, cache, whole.ids, asking))
        name = cache.request.name
    return Result(answers, AWARE, name, str(request.keep), 0.0)


@check_arguments
def compress(
    model: Any,
    tokenizer: Any,
    context: str | Document,
    *,
    method: str | Method | Request = "auto",
    keep: int | float | str = 512,
    chat: bool | None = None,
    system: str | None = None,
    truncate: Truncate = "error",
    prefill_chunk: Some | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Cache:
    """Read a context and evict at its end, before any question is known (question-agnostic).

    Args and errors as `generate`. Ask the cache with `generate(model, tokenizer, cache,
    question)`, save it with `cache.save(path)`.
    """
    request = Request.of(method, keep, settings)
    request.method.require_passes(prefill_chunk)
    template = Template(chat, system)
    around = template.frame(tokenizer)
    prompt = fit_context(tokenizer, around, context, window(model) - 1, truncate)
    cache = _empty(model, request, prompt, repeat_words(tokenizer, around), template)
    _read_context(model, cache, prompt, prefill_chunk, progress, len(prompt))
    return cache


def _require_unsaid(said: dict[str, bool]) -> None:
    """Refuse what was settled when a cache was made."""
    for name, is_said in said.items():
        if is_said:
            raise UsageError(f"{name} was settled when the cache was made; leave it out")


def _empty(
    model: Any, request: Request, prompt: Prompt, words: Words, template: Template
) -> Cache:
    """A cache for a prompt that is about to be read."""
    told = {"words": words, "template": template}
    return Cache(model, request, prompt_tokens=len(prompt), spans=prompt.spans, **told)


def _read_context(
    model: Any,
    cache: Cache,
    prompt: Prompt,
    chunk: int | None,
    progress: Progress | None,
    reach: int,
) -> None:
    """Read a context into a cache; `reach` is how many tokens there will be in all."""
    cache.require_reach(min(chunk or len(prompt), len(prompt)), reach)
    with attach(model):
        read(model, torch.tensor([prompt.ids], device=model.device), cache, chunk, progress)
    synchronize(model.device)


def _ask(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    questions: Sequence[str],
    compress_s: float,
    asking: dict[str, Any],
) -> Result:
    """Ask a compressed context; it is as before afterwards, whatever happens in between."""
    if cache.token_ids is None or cache.token_ids.shape[0] != 1:
        raise CacheError(
            "only a cache of one context, read as tokens, can be asked; make it with compress"
        )
    around = (cache.template or Template()).frame(tokenizer)
    context, mark, answers = cache.token_ids[0].tolist(), cache.mark(), []
    for text in questions:
        ids = context + encode_question(tokenizer, around, text).ids
        if len(ids) + asking["max_new_tokens"] > window(model):
            raise UsageError(_too_long(len(ids), asking["max_new_tokens"], window(model)))
        try:
            answers.append(answer(model, tokenizer, cache, ids, asking))
        finally:
            cache.rewind(mark)
    return Result(answers, AGNOSTIC, cache.request.name, str(cache.keep), compress_s)


def answer(
    model: Any, tokenizer: Any, cache: Cache, ids: list[int], asking: dict[str, Any]
) -> Answer:
    """The answer to a whole prompt, of which a cache has read some, all or nothing."""
    held: dict[str, Any] = {}

    def look() -> None:
        held["held_bytes"], held["full_bytes"] = cache.held_bytes, cache.full_bytes
        held["kept"] = [counts[0].tolist() for counts in cache.entries()]
        held["remark"] = cache.remark

    reused = cache.seen
    with attach(model):
        done = run(model, torch.tensor([ids], device=model.device), cache, on_first=look, **asking)
    text = tokenizer.decode(done.token_ids, skip_special_tokens=True).strip()
    held["decoding"] = done.decoding
    held["reused_tokens"] = reused
    return Answer(text, done.token_ids, done.ttft_s, done.tpot_s, len(ids), **held)


def fit_context(
    tokenizer: Any, around: Frame, context: str | Document, room: int, truncate: Truncate
) -> Prompt:
    """A context that fits into `room` tokens."""
    if not Document.of(context).text.strip():
        raise UsageError("the context is empty")
    cuts = truncate == "middle"
    prompt = encode_context(tokenizer, around, context, room if cuts else None)
    if len(prompt) > room:
        raise UsageError(_too_long(len(prompt), 0, room))
    return prompt


def _too_long(tokens: int, answer: int, window: int) -> str:
    plus = f" and {answer} for the answer" if answer else ""
    return (
        f"the prompt has {tokens} tokens{plus}, the model's window leaves room for {window}; "
        "shorten it, ask for fewer new tokens, or cut its middle "
        "(truncate='middle', --truncate middle)"
    )
