"""`ask` and `compress`: answers from a document with a small cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output, results
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.api import Result
    from kvtrim.methods.request import Request
    from kvtrim.serve.library import Entry

CacheFile = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Ask a cache that `kvtrim compress` saved, instead of a document."
    ),
]
EMPTY = "(an empty answer: the model ended it at once)"
MADE = ("method", "keep", "set_", "protocol", "chat", "system", "truncate", "shots_separator")
Stream = Annotated[bool, typer.Option("--stream", help="Print answers as they come.")]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Keep it in the library under this name: `kvtrim ask @NAME`."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to save the cache.")]


def ask(
    context: typer.Context,
    document: options.Document = None,
    question: options.Questions = None,
    cache: CacheFile = None,
    library: options.Library = None,
    method: options.Method = "auto",
    keep: options.Keep = "512",
    set_: options.Set = None,
    max_new_tokens: options.NewTokens = 128,
    stream: Stream = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
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
    """Answer questions about a document, a named one (@NAME) or a saved cache."""
    from kvtrim.methods.settings import places

    questions, name = options.read_questions(question), options.name_in(document)
    named = method if places([method]) else None  # which a file names, and only the caller may
    if cache is not None or name is not None:
        made = f"{cache} was made" if cache is not None else f"@{name} was compressed"
        options.require_no_other(context, MADE, made, named)
    if cache is not None and document is not None:
        raise UsageError("give a document or --cache, not both")
    if cache is not None and not cache.is_file():
        raise UsageError(f"no such cache file: {cache}")
    if json and stream:
        raise UsageError("--json is one object at the end; leave --stream or --json out")
    request = options.request(method, keep, set_, protocol, truncate, prefill_chunk)
    sampling = options.sampling_options(temperature, top_p, seed)
    own = None if name is None else options.library_in(library)
    if own is not None and name is not None:
        own.get(name)
    ready = cache is not None or name is not None
    text = None if ready else options.read_document(document, shots_separator)
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    from kvtrim.api import generate
    from kvtrim.hf.cache import load_cache

    given: Any = text if cache is None else load_cache(cache, loaded, tokenizer, named)
    if own is not None and name is not None:
        from kvtrim.serve import documents

        prints = documents.Prints.of(model, loaded, tokenizer)
        _, given = documents.load(own, name, loaded, tokenizer, prints, named)
    how: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        protocol=protocol,
        chat=chat,
        system=system,
        truncate=truncate,
        prefill_chunk=prefill_chunk,
        **sampling,
    )
    if stream:
        _stream(loaded, tokenizer, given, questions, request, how)
        return
    with output.progress() as report:
        result = generate(
            loaded, tokenizer, given, questions, method=request, progress=report, **how
        )
    _print_answers(result, questions, json)


def _stream(
    model: Any,
    tokenizer: Any,
    given: Any,
    questions: list[str],
    request: "Request",
    how: dict[str, Any],
) -> None:
    """Every answer as it comes; a context that was not read yet is read once for all."""
    from kvtrim.api import generate
    from kvtrim.hf.cache import Cache
    from kvtrim.serve.stream import Streamer

    if len(questions) > 1 and not isinstance(given, Cache):
        raise UsageError(
            "--stream with several questions needs a compressed document: kvtrim compress FILE "
            "--name NAME, then kvtrim ask @NAME --stream -q ... -q ..."
        )
    for question in questions:
        if len(questions) > 1:
            output.out.print(question, style="bold")
        show = output.Stream()
        shown = {**how, "streamer": Streamer(tokenizer, show)}
        result = generate(model, tokenizer, given, [question], method=request, **shown)
        show.end(EMPTY)
        _print_figures(result)


def compress(
    context: typer.Context,
    document: options.Document = None,
    out: Out = Path("cache.kv"),
    name: Name = None,
    library: options.Library = None,
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
    """Read a document once, evict before any question is known, keep the cache for `ask`."""
    request = options.request(method, keep, set_, None, truncate, prefill_chunk)
    if name is not None:
        from kvtrim.serve.library import check_name

        options.require_unset(context, ("out",), "names a file, --name a document of the library")
        check_name(name)
    else:
        options.require_writable(out)
    text = options.read_document(document, shots_separator, library)
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    how = dict(
        chat=chat,
        system=system,
        truncate=truncate,
        prefill_chunk=prefill_chunk,
    )
    if name is not None:
        from kvtrim.serve import documents

        prints = documents.Prints.of(model, loaded, tokenizer)
        asked = documents.How(request, **how)  # pyright: ignore[reportArgumentType]
        own = options.library_in(library)
        with output.progress() as report:
            entry, read = documents.add(own, name, loaded, tokenizer, prints, text, asked, report)
        record = _facts(f"@{name}", entry.file_bytes, entry)
        record |= {"read_tokens": entry.tokens if read else 0, "library": str(own.folder)}
        _print_compression(record, json)
        return
    from kvtrim.api import compress as run

    with output.progress() as report:
        cache = run(loaded, tokenizer, text, method=request, progress=report, **how)  # pyright: ignore[reportArgumentType] (checked above)
    cache.save(out, tokenizer)
    record = {
        "file": str(out),
        "file_bytes": out.stat().st_size,
        "protocol": "question-agnostic",
        "method": cache.request.name,
        "keep": str(cache.keep),
        "tokens": cache.seen,
        "read_tokens": cache.seen,
        "held_bytes": cache.held_bytes,
        "full_bytes": cache.full_bytes,
        "remark": cache.remark,
    }
    _print_compression(record, json)


def _facts(where: str, file_bytes: int, entry: "Entry") -> dict[str, Any]:
    return {
        "file": where,
        "file_bytes": file_bytes,
        "protocol": "question-agnostic",
        "method": entry.method,
        "keep": entry.keep,
        "tokens": entry.tokens,
        "held_bytes": entry.held_bytes,
        "full_bytes": entry.full_bytes,
        "remark": entry.remark,
    }


def _print_compression(record: dict[str, Any], json: bool) -> None:
    if json:
        output.print_json(record)
        return
    share = 100 * record["held_bytes"] / record["full_bytes"]
    again = "" if record["read_tokens"] else ", found in the library and not read again"
    output.out.print(
        f"{record['file']}: {record['tokens']} tokens, {output.size(record['held_bytes'])} held "
        f"({share:.1f}% of the full cache), {record['method']} {record['keep']}, "
        f"question-agnostic{again}"
    )
    if record["remark"]:
        output.note(record["remark"])


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
    _print_figures(result)


def _print_figures(result: "Result") -> None:
    share = 100 * result.held_bytes / result.full_bytes
    output.err.print(
        f"{result.method} {result.keep}, {result.protocol}: {result.prompt_tokens} prompt tokens, "
        f"first token after {output.seconds(result.ttft_s)}, then {output.seconds(result.tpot_s)} "
        f"each, {output.size(result.held_bytes)} held ({share:.1f}% of full); "
        f"{_tokens_read(result)}",
        style="dim",
        highlight=False,
    )
    if result.remark:
        output.note(result.remark)


def _tokens_read(result: "Result") -> str:
    """How many tokens were read for these answers, and how many were there."""
    read, reused = result.read_tokens, result.reused_tokens
    if not reused:
        return f"{read:,} tokens read"
    return f"{read:,} tokens read, 0 of {reused:,} document tokens re-read"
