"""`view`: what was kept of a document, as one HTML file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.cli.ask import CacheFile
from kvtrim.cli.compare import Evidence, cells_of
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.bench.candidates import Candidate
    from kvtrim.report.viewer.exhibit import Exhibit

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write the page.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        "--budget",
        help="A stop of the slider, or several with commas between them: 1/16, 25%, 512, 64MiB. "
        "Default: 1/16,1/8,1/4,1/2.",
    ),
]
Question = Annotated[
    str | None,
    typer.Option("--question", "-q", help="Ask this at every stop, and with the full cache."),
]
STOPS = ("1/16", "1/8", "1/4", "1/2")
_READ = ("set_", "protocol", "chat", "system", "truncate", "prefill_chunk")


def view(
    context: typer.Context,
    document: options.Document = None,
    cache: CacheFile = None,
    library: options.Library = None,
    out: Out = Path("kept.html"),
    method: options.Methods = None,
    keep: Budgets = None,
    question: Question = None,
    evidence: Evidence = None,
    set_: options.Set = None,
    max_new_tokens: options.NewTokens = 48,
    protocol: options.OneProtocol = "question-agnostic",
    chat: options.Chat = None,
    system: options.System = None,
    truncate: options.Truncate = "error",
    prefill_chunk: options.Chunk = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
) -> None:
    """Show what was kept of a document: one HTML file, its text shaded by the heads that keep it.

    A file is read once and cut at every budget, by one method or by several to set side by side.
    A named document (@NAME) or --cache is shown as it is held (with --method module:NAME, if your
    own method made it); a named document's text is read anew with another --method or --keep.
    """
    if cache is not None and document is not None:
        raise UsageError("give a document or --cache, not both")
    if cache is not None and not cache.is_file():
        raise UsageError(f"no such cache file: {cache}")
    if question is not None and not question.strip():
        raise UsageError("the question is empty; leave -q out, or ask something")
    name = options.name_in(document)
    own = _own_method(method, None if cache is not None else name, library, keep)
    anew = keep is not None or (method is not None and own is None)
    if cache is not None or (name is not None and not anew):
        what = f"{cache} was made" if cache is not None else f"@{name} was compressed"
        settled = (*_READ, "method", "keep") if cache is not None else _READ
        options.require_no_other(context, settled, what, own)
    options.require_writable(out)
    how: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        protocol=options.choose("--protocol", protocol, options.PROTOCOLS),
        chat=chat,
        system=system,
        truncate=options.choose("--truncate", truncate, options.TRUNCATE),
        prefill_chunk=prefill_chunk,
    )
    named = (model, device, dtype, threads, allow_untested)
    if cache is None and (name is None or anew):
        stops = _stops(keep)
        cells = cells_of(method or ["auto"], stops, set_, prefill_chunk)
        text = options.read_document(document, folder=library)
        if question is None and how["protocol"] != "question-agnostic":
            raise UsageError("question-aware needs the question: give -q")
        if question is None and "full" not in (method or ()):
            cells = [cell for cell in cells if cell.method != "full"]
        exhibit = _read(text, cells, question, evidence, how, named)
    else:
        held = cache if cache is not None else options.library_in(library)
        exhibit = _load(held, name, own, question, evidence, max_new_tokens, named)
    exhibit.save(out)
    size = output.size(out.stat().st_size)
    output.out.print(f"{out}: {len(exhibit.pieces):,} tokens, {len(exhibit.stops)} stops, {size}")


def _own_method(
    given: list[str] | None, name: str | None, library: Path | None, keep: list[str] | None
) -> str | None:
    """The method of one's own that made what is held, which a file does not get imported."""
    from kvtrim.methods.settings import places

    if given is None or len(given) > 1 or keep is not None or not places(given):
        return None
    if name is None:
        return given[0]
    made = options.library_in(library).get(name).method
    return given[0] if places([made]) == places(given) else None


def _stops(given: list[str] | None) -> list[str]:
    """The budgets, each once."""
    texts = [text.strip() for each in given or STOPS for text in each.split(",")]
    return list(dict.fromkeys(text for text in texts if text)) or list(STOPS)


def _read(
    text: Any,
    cells: list["Candidate"],
    question: str | None,
    evidence: list[str] | None,
    how: dict[str, Any],
    named: tuple[Any, ...],
) -> "Exhibit":
    """A document that is read, and what is held of it at every stop."""
    loaded, tokenizer = options.load(*named)
    from kvtrim.bench.comparison import Comparison
    from kvtrim.bench.kept import Showing

    comparison = Comparison(loaded, tokenizer, text, question or "", cells, **how)
    showing = Showing(loaded, tokenizer, comparison, question)
    showing.require_evidence(evidence or ())
    with output.progress() as report:

        def progress_of(cell: "Candidate") -> Any:
            label = f"{cells.index(cell) + 1} of {len(cells)}: {cell.said}"
            return lambda what, done, out_of: report(f"{label}, {what}", done, out_of)

        if question is None:
            showing.caches(progress_of)
        else:
            showing.results(progress_of)
    return showing.exhibit(named[0], evidence or ())


def _load(
    where: Any,
    name: str | None,
    own: str | None,
    question: str | None,
    evidence: list[str] | None,
    max_new_tokens: int,
    named: tuple[Any, ...],
) -> "Exhibit":
    """A cache that is there: a file, or a document of a library."""
    loaded, tokenizer = options.load(*named)
    from kvtrim.bench.kept import show_cache
    from kvtrim.hf.cache import load_cache
    from kvtrim.hf.view import view as show

    if name is None:
        cache = load_cache(where, loaded, tokenizer, own)
    else:
        from kvtrim.serve import documents

        prints = documents.Prints.of(named[0], loaded, tokenizer)
        _, cache = documents.load(where, name, loaded, tokenizer, prints, own)
    if question is None:
        return show(cache, tokenizer, evidence=evidence or ())
    with output.progress() as report:
        return show_cache(
            loaded,
            tokenizer,
            cache,
            question,
            evidence=evidence or (),
            max_new_tokens=max_new_tokens,
            progress=report,
        )
