"""`ask` and `compress`: answers from a document with a small cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtrim.cli import options, output, results
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.api import Result

CacheFile = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Ask a cache that `kvtrim compress` saved, instead of a document."
    ),
]
EMPTY = "(an empty answer: the model ended it at once)"
MADE = ("method", "keep", "set_", "protocol", "chat", "system", "truncate", "shots_separator")
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to save the cache.")]


def ask(
    context: typer.Context,
    document: options.Document = None,
    question: options.Questions = None,
    cache: CacheFile = None,
    method: options.Method = "auto",
    keep: options.Keep = "512",
    set_: options.Set = None,
    max_new_tokens: options.NewTokens = 128,
    protocol: options.Protocol = None,
    chat: options.Chat = None,
    system: options.System = None,
    truncate: options.Truncate = "error",
    shots_separator: options.Shots = None,
    prefill_chunk: options.Chunk = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Answer questions about a document, or a saved cache, with a small cache."""
    questions = options.read_questions(question)
    if cache is not None:
        options.require_unset(context, MADE, f"was settled when {cache} was made; leave it out")
    settings = options.checked(method, [keep], set_, protocol, truncate, prefill_chunk)
    text = None if cache is not None else options.read_document(document, shots_separator)
    if cache is not None and document is not None:
        raise UsageError("give a document or --cache, not both")
    if cache is not None and not cache.is_file():
        raise UsageError(f"no such cache file: {cache}")
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    from kvtrim.hf.saving import load_cache

    own = method if ":" in method else None  # which a file names, and only the caller may
    given = text if cache is None else load_cache(cache, loaded, tokenizer, own)
    how = dict(
        max_new_tokens=max_new_tokens,
        protocol=protocol,
        chat=chat,
        system=system,
        truncate=truncate,
        prefill_chunk=prefill_chunk,
    )
    with output.progress() as report:
        result = results.generate(
            loaded, tokenizer, given, questions, method, keep, settings, how, report
        )
    _print_answers(result, questions, json)


def compress(
    document: options.Document = None,
    out: Out = Path("cache.kv"),
    method: options.Method = "auto",
    keep: options.Keep = "512",
    set_: options.Set = None,
    chat: options.Chat = None,
    system: options.System = None,
    truncate: options.Truncate = "error",
    shots_separator: options.Shots = None,
    prefill_chunk: options.Chunk = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Read a document once, evict before any question is known, save a cache for `ask --cache`."""
    settings = options.checked(method, [keep], set_, None, truncate, prefill_chunk)
    text = options.read_document(document, shots_separator)
    options.require_writable(out)
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    from kvtrim.api import compress as read

    with output.progress() as report:
        cache = read(
            loaded,
            tokenizer,
            text,
            method=method,
            keep=keep,
            chat=chat,
            system=system,
            truncate=truncate,  # pyright: ignore[reportArgumentType] (checked above)
            prefill_chunk=prefill_chunk,
            progress=report,
            **settings,
        )
    cache.save(out, tokenizer)
    record = {
        "file": str(out),
        "file_bytes": out.stat().st_size,
        "protocol": "question-agnostic",
        "method": method,
        "keep": str(cache.keep),
        "tokens": cache.seen,
        "held_bytes": cache.held_bytes,
        "full_bytes": cache.full_bytes,
        "remark": cache.remark,
    }
    if json:
        output.print_json(record)
    else:
        share = 100 * cache.held_bytes / cache.full_bytes
        output.out.print(
            f"{out}: {cache.seen} tokens, {output.size(cache.held_bytes)} held "
            f"({share:.1f}% of the full cache), {method} {cache.keep}, question-agnostic"
        )
        if cache.remark:
            output.note(cache.remark)


def _print_answers(result: "Result", questions: list[str], json: bool) -> None:
    if json:
        record = results.record(result)
        for answer, question in zip(record["answers"], questions, strict=True):
            answer["question"] = question
        output.print_json(record)
        return
    for question, text in zip(questions, result.texts, strict=True):
        if len(questions) > 1:
            output.out.print(question, style="bold")
        output.out.print(text or EMPTY, markup=False, highlight=False)
    share = 100 * result.held_bytes / result.full_bytes
    output.err.print(
        f"{result.method} {result.keep}, {result.protocol}: {result.prompt_tokens} prompt tokens, "
        f"first token after {output.seconds(result.ttft_s)}, then {output.seconds(result.tpot_s)} "
        f"each, {output.size(result.held_bytes)} held ({share:.1f}% of full)",
        style="dim",
        highlight=False,
    )
    if result.remark:
        output.note(result.remark)
