"""`chat`: a conversation about a document, or about nothing, in a terminal."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.cli.ask import EMPTY, MADE
from kvtrim.errors import KvtrimError, UsageError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

    from kvtrim.methods.keep import Keep
    from kvtrim.methods.method import Method
    from kvtrim.methods.request import Request
    from kvtrim.serve.talk import Talk

HELP = """\
/held           bytes held, and how many tokens were read and reused
/keep BUDGET    read the document again with another budget; the turns stay
/method NAME    likewise with another method
/undo           take the last question and its answer back
/save NAME      keep the document in the library: kvtrim chat @NAME
/quit           or Ctrl-D; Ctrl-C stops an answer"""

_TAKEN_BACK = "the question is taken back"

NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


def chat(
    context: typer.Context,
    document: options.Document = None,
    library: options.Library = None,
    method: options.Method = "auto",
    keep: options.Keep = "25%",
    set_: options.Set = None,
    max_new_tokens: NewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
) -> None:
    """Talk about a document that is read once; answers stream. /help lists the commands."""
    from kvtrim.methods.settings import places

    options.is_sampling(temperature, top_p, seed)
    named = method if places([method]) else None  # which a file names, and only the caller may
    name, own = options.name_in(document), options.library_in(library)
    if name is not None:
        options.require_no_other(context, MADE, f"@{name} was compressed", named)
    request = options.request(method, keep, set_, None, "error")
    if document == "-":
        raise UsageError("chat reads questions from standard input; name the document's file")
    text = None
    if name is not None:
        entry = own.get(name)
        text = own.text(entry)
    elif document is not None:
        text = options.read_text(document)
    questions = _questions()
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    sampling = {
        "max_tokens": max_new_tokens,
        "temperature": float(temperature or 0),
        "top_p": 1.0 if top_p is None else top_p,
        "seed": seed,
    }
    one = Chat(loaded, tokenizer, model, own, text, request, sampling)
    one.begin(name, named)
    one.run(questions)


class Chat:
    """What is said and done in one chat."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str,
        library: Any,
        text: str | None,
        request: "Request",
        sampling: dict[str, Any],
    ):
        self._model, self._tokenizer, self._label = model, tokenizer, label
        self._library, self._text = library, text
        self._request, self._sampling = request, sampling
        self._named: str | None = None  # where the document came from, unless it was read here
        self._talk: Talk | None = None
        self._cache: Any = None

    def begin(self, name: str | None, own: str | None = None) -> None:
        """Read the document, or load a named one.

        Args:
            own: the method of one's own that made the named one, as `documents.load` takes it.
        """
        from kvtrim.serve import documents
        from kvtrim.serve.reading import document_of
        from kvtrim.serve.talk import Talk

        if name is None:
            self._read(self._request.named, self._request.keep)
            return
        given = self._model, self._tokenizer
        prints = documents.Prints.of(self._label, *given)
        entry, cache = documents.load(self._library, name, *given, prints, own)
        self._request, self._named = cache.request, name
        self._talk = Talk(*given, document_of(entry.key, cache))
        output.note(f"@{name}: 0 of {entry.tokens:,} document tokens re-read; /help for help")

    def run(self, questions: Iterator[str]) -> None:
        """Answer until nobody asks any more."""
        for line in questions:
            word, _, rest = line.strip().partition(" ")
            if not word:
                continue
            if word == "/quit":
                return
            try:
                if word.startswith("/"):
                    self._command(word, rest.strip())
                else:
                    self._answer(line.strip())
            except KvtrimError as error:
                output.note(str(error))

    @property
    def talk(self) -> "Talk":
        """The conversation."""
        if self._talk is None:
            raise UsageError("the chat has not begun")
        return self._talk

    def _answer(self, question: str) -> None:
        show, pieces = output.Stream(), self.talk.ask(question, **self._sampling)
        try:
            for piece in pieces:
                show(piece)
            show.end(f"{EMPTY}; {_TAKEN_BACK}")
        except KeyboardInterrupt:
            pieces.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator)
            show.end(f"(stopped); {_TAKEN_BACK}")

    def _command(self, word: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: output.out.print(HELP),
            "/held": self._print_memory,
            "/keep": lambda keep: self._read(self._request.named, keep),
            "/method": lambda method: self._read(method, self._request.keep),
            "/undo": self._undo,
            "/save": self._save,
        }
        if word not in commands:
            raise UsageError(f"no command {word}; /help lists them")
        if word in ("/keep", "/method", "/save") and not rest:
            raise UsageError(f"{word} what? /help shows how")
        commands[word](rest)

    def _read(self, method: "str | Method", keep: "str | Keep") -> None:
        """Read the document with this method and budget; the turns so far go on behind it."""
        from kvtrim.methods.request import Request
        from kvtrim.serve.reading import document_of
        from kvtrim.serve.talk import Talk

        if self._text is None and self._talk is not None:
            raise UsageError("there is no document to read again; kvtrim chat FILE opens one")
        same = method == self._request.named
        request = Request.of(method, keep, self._request.settings if same else {})
        before = [] if self._talk is None else self._talk.messages
        document = None
        if self._text is not None:
            from kvtrim.api import compress

            with output.progress() as report:
                self._cache = compress(
                    self._model, self._tokenizer, self._text, method=request, progress=report
                )
            cache = self._cache
            output.note(
                f"{cache.seen:,} document tokens read, {output.size(cache.held_bytes)} held of "
                f"{output.size(cache.full_bytes)}; /help for help"
            )
            if cache.remark:
                output.note(cache.remark)
            document = document_of("document", cache.copy())
        self._talk = Talk(self._model, self._tokenizer, document, before)
        self._request, self._named = request, None

    def _print_memory(self, _: str) -> None:
        document, usage = self.talk.document, self.talk.usage
        if document is not None:
            share = 100 * document.held_bytes / document.full_bytes
            output.out.print(
                f"document: {document.tokens:,} tokens, {output.size(document.held_bytes)} "
                f"({share:.1f}% of full), {self._request.name} {self._request.keep}"
            )
        if usage is not None:
            read = usage.prompt_tokens - usage.reused_tokens
            output.out.print(
                f"all: {output.size(usage.held_bytes)} of {output.size(usage.full_bytes)}; for "
                f"the last answer {read:,} tokens were read, {usage.reused_tokens:,} reused"
            )

    def _undo(self, _: str) -> None:
        if not self.talk.undo():
            raise UsageError("there is nothing to undo")

    def _save(self, name: str) -> None:
        from kvtrim.prompts.document import Document
        from kvtrim.serve import documents

        if self._text is None:
            raise UsageError("there is no document to save")
        name = name.removeprefix("@")
        if self._named is not None:
            entry = self._library.name_again(self._library.get(self._named), name)
            if entry is None:
                raise UsageError(f"the files of @{self._named} were removed meanwhile")
        else:
            prints = documents.Prints.of(self._label, self._model, self._tokenizer)
            text, how = Document.of(self._text), documents.How(self._request)
            entry = documents.keep(
                self._library, name, self._tokenizer, prints, text, how, self._cache
            )
        output.out.print(f"@{entry.name}: {output.size(entry.file_bytes)} on disk")


def _questions() -> Iterator[str]:
    """Lines of a terminal, with editing and a history; or of standard input as they are."""
    import sys

    if not sys.stdin.isatty():
        return iter(sys.stdin)
    from prompt_toolkit import PromptSession

    return _lines(PromptSession(history=_history()))


def _lines(session: "PromptSession[str]") -> Iterator[str]:
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _history() -> "History":
    """Questions of all chats, in a file; those of this one where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from kvtrim.serve.library import data_folder

    path = data_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
