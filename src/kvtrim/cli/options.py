"""Options that several commands share, and reading what they name."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from kvtrim import files
from kvtrim.errors import UsageError
from kvtrim.records.spec import PROTOCOLS

if TYPE_CHECKING:
    from kvtrim.methods import request as asked
    from kvtrim.prompts import document
    from kvtrim.serve import library

Choice = TypeVar("Choice", bound=str)

Model = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a folder, a .gguf file or a Hub id.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, or auto-map for models larger than one GPU. Default: the "
        "best there is."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")
]
Method = Annotated[
    str, typer.Option("--method", help="A name of `kvtrim methods`, or module:NAME.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="A name of `kvtrim methods`, with parameters of its own behind a colon if it is to "
        "have any (snapkv:preset=kvf,window=16); repeat for several.",
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        "--keep", help="Budget: tokens (512), share of the prompt (25%) or bytes (64MiB)."
    ),
]
Keeps = Annotated[
    list[str] | None, typer.Option("--keep", help="Budget as in `ask`; repeat for several.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A parameter: name=value (preset=kvpress, window=16). Of several methods, those take "
        "it that have it and do not set it themselves.",
    ),
]
Questions = Annotated[
    list[str] | None, typer.Option("--question", "-q", help="A question; repeat for several.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
_PROTOCOL: Any = typer.Option(
    help="question-aware (read context and question together; default for one question) or "
    "question-agnostic (compress the context first; default for several)."
)
Protocol = Annotated[str | None, _PROTOCOL]
OneProtocol = Annotated[str, _PROTOCOL]  # of a command that has its own default
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the chat template. Default: if there is one."),
]
System = Annotated[str | None, typer.Option(help="A system message for the chat template.")]
Truncate = Annotated[
    str, typer.Option(help="If the prompt exceeds the model's window: error, or cut the middle.")
]
Chunk = Annotated[
    int | None,
    typer.Option("--prefill-chunk", min=1, help="Read at most so many tokens in one pass."),
]
AllowUntested = Annotated[
    bool,
    typer.Option(
        "--allow-untested",
        help="Accept an architecture that kvtrim is not tested on; `kvtrim check` tries it first.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Shots = Annotated[
    str | None,
    typer.Option(
        "--shots-separator",
        help="The document is a row of shots (examples) with this text between them (\\n is a "
        "line break), for methods that keep whole shots. Default: every sentence is one.",
    ),
]
TRUNCATE: tuple[Literal["error"], Literal["middle"]] = ("error", "middle")
Document = Annotated[
    str | None,
    typer.Argument(help="A text file, - for standard input, or @NAME of `kvtrim caches`."),
]
Library = Annotated[
    Path | None,
    typer.Option(
        "--library",
        envvar="KVTRIM_LIBRARY",
        help="The folder of named documents. Default: in your data folder.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="Sample at this temperature. Default: greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0, max=1, help="Sample from the likeliest tokens of this share."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the sampling.")]


def library_in(folder: Path | None) -> "library.Library":
    """The named documents of a folder, by default of the user's data folder."""
    from kvtrim.serve.library import Library, default_folder

    folder = folder or default_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the library {folder} is a file; name a folder (--library)")
    return Library(folder)


def name_in(given: str | None) -> str | None:
    """The name in `@name`; None if a file is meant (`./@name` for one called like that)."""
    return given[1:] if given is not None and given.startswith("@") else None


def is_sampling(temperature: float | None, top_p: float | None, seed: int | None) -> bool:
    """Whether tokens are drawn; greedy decoding unless a temperature is given.

    Raises:
        UsageError: settings of sampling without sampling, or out of range.
    """
    from kvtrim.methods.ranges import COLDEST

    if temperature is None or temperature < COLDEST:
        if top_p is not None or seed is not None:
            raise UsageError("--top-p and --seed act on sampling: give --temperature 0.7 too")
        return False
    if temperature > 10 or top_p == 0:
        raise UsageError("--temperature is at most 10, --top-p above 0; for greedy leave both out")
    if seed is not None and abs(seed) >= 2**63:
        raise UsageError(f"--seed {seed}: give a 64-bit number")
    return True


def sampling_options(
    temperature: float | None, top_p: float | None, seed: int | None
) -> dict[str, float | bool]:
    """How `kvtrim.generate` is to choose tokens. Raises as `is_sampling`."""
    if not is_sampling(temperature, top_p, seed):
        return {}
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    given: dict[str, Any] = {"do_sample": True, "sampling.temperature": temperature}
    return given | ({} if top_p is None else {"top_p": top_p})


def read_document(
    name: str | None, separator: str | None = None, folder: Path | None = None
) -> "str | document.Document":
    """The text of a document, split into shots where a separator was given.

    Raises:
        UsageError: as `read_text`, no such named document, or no such separator in it.
    """
    known = name_in(name)
    if known is None:
        text = read_text(name)
    else:
        own = library_in(folder)
        text = own.text(own.get(known))
    if separator is None:
        return text
    from kvtrim.prompts import document

    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    return document.Document.split(text, separator)


def read_text(name: str | None) -> str:
    """What stands in a file.

    Raises:
        UsageError: no such file, not text, or nothing in it.
    """
    if name is None:
        raise UsageError("no document given; name a text file, or - for standard input")
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such document: {name}") from None
    except IsADirectoryError:
        raise UsageError(f"{name} is a folder; name a text file") from None
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text; convert it to plain text first") from None
    if not text.strip():
        raise UsageError(f"the document {name} is empty")
    return text


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """`--set name=value` as keyword arguments; the method converts the text.

    Raises:
        UsageError: no equals sign, or a name twice.
    """
    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair}: write name=value, for example --set window=16")
        if name.strip() in settings:
            raise UsageError(f"--set {name.strip()} is given twice; give it once")
        settings[name.strip()] = value.strip()
    return settings


def require_choice(option: str, value: str | None, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices; none is no value.

    Raises:
        UsageError: naming the choices.
    """
    if value is not None:
        choose(option, value, choices)


def choose(option: str, value: str, choices: Sequence[Choice]) -> Choice:
    """The choice that a value names. Raises as `require_choice`."""
    for choice in choices:
        if choice == value:
            return choice
    raise UsageError(f"{option} {value}: use {' or '.join(choices)}")


def parse_size(text: str, refusal: str) -> int:
    """The bytes of a size such as 8GiB. Raises UsageError, saying `refusal`, if it is none."""
    from kvtrim.methods.keep import Keep

    try:
        size = Keep.parse(text)
    except UsageError:
        size = None
    if size is None or size.kind != "bytes":
        raise UsageError(refusal)
    return int(size.amount)


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        UsageError: a folder, or a place in a folder that is missing or closed.
    """
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder {folder} is not writable")


def require_folder(out: Path) -> None:
    """Refuse a folder, given with --out, that could be neither made nor written into.

    Raises:
        UsageError: it is a file, or its place is missing or closed.
    """
    files.require_place(out, " with --out")
    if not os.access(out if out.exists() else out.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write into {out}; name another folder with --out")


def read_questions(given: list[str] | None) -> list[str]:
    """The questions asked.

    Raises:
        UsageError: there are none, or one is empty.
    """
    if not given or not all(text.strip() for text in given):
        raise UsageError("no question; ask with -q 'What ...?'")
    return given


def request(
    method: str,
    keep: str,
    pairs: list[str] | None,
    protocol: str | None,
    truncate: str,
    prefill_chunk: int | None = None,
) -> "asked.Request":
    """What was asked for, once everything that needs no model was checked.

    Raises:
        UsageError: an unknown method, parameter or choice, or a budget that cannot be met.
    """
    from kvtrim.methods.request import Request

    require_choice("--protocol", protocol, PROTOCOLS)
    require_choice("--truncate", truncate, TRUNCATE)
    found = Request.of(method, keep, parse_settings(pairs))
    found.method.require_passes(prefill_chunk)
    return found


def require_unset(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse flags that cannot act beside another one.

    Raises:
        UsageError: naming the first of them that was given.
    """
    for each in context.command.params:
        source = context.get_parameter_source(each.name or "")
        if each.name in names and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{each.opts[0]} {why}")


def require_no_other(
    context: typer.Context, names: tuple[str, ...], made: str, own: str | None = None
) -> None:
    """Refuse flags that say otherwise what a cache settled when it was made.

    Args:
        made: "doc.kv was made".
        own: a method of one's own, which a file names, and only the caller may give.
    """
    names = tuple(each for each in names if own is None or each != "method")
    require_unset(context, names, f"was settled when {made}; leave it out")


def load(
    model: str,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    allow_untested: bool = False,
) -> tuple[Any, Any]:
    """The model and tokenizer that the options name, with a word on standard error meanwhile."""
    from kvtrim.cli.output import busy

    with busy(f"loading {model}"):
        import torch

        from kvtrim.hf.models.load import load as load_model

        if threads is not None:
            torch.set_num_threads(threads)
        return load_model(model, device=device, dtype=dtype, allow_untested=allow_untested)
