"""The command line: parse, call, print, exit.

Every error leaves by one door: one line that says what happened and an exit code. `--debug`,
anywhere among the arguments, keeps the traceback of errors that nobody foresaw. Heavy imports
happen inside the commands, so that `--help` answers at once.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from kvtrim.cli import (
    analyze,
    ask,
    caches,
    calibrate,
    chat,
    check,
    compare,
    eval,
    lm_eval,
    methods,
    papers,
    recommend,
    report,
    serve,
    speed,
    sweep,
    view,
)
from kvtrim.errors import KvtrimError, UsageError
from kvtrim.version import VERSION

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
DEBUG = "--debug"

app = typer.Typer(
    name="kvtrim",
    help="A small KV cache for Hugging Face language models, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("methods")(methods.methods)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("compress")(ask.compress)
app.command("view")(view.view)
app.command("serve")(serve.serve)
app.command("speed")(speed.speed)
app.command("eval")(eval.evaluate)
app.command("sweep")(sweep.sweep)
app.command("recommend")(recommend.recommend)
app.command("report")(report.report)
app.command("analyze")(analyze.analyze)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(lm_eval.lm_eval)
app.command("check")(check.check)
app.add_typer(caches.group, name="caches")
app.add_typer(calibrate.group, name="calibrate")
app.add_typer(papers.group, name="papers")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvtrim {VERSION}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[  # taken out by `main`, wherever it stands
        bool, typer.Option("--debug", help="Show where an unforeseen error came from.")
    ] = False,
) -> None:
    """Say what the program is."""


def main() -> None:
    """Run a command; every error is one line and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    folder = os.getcwd() if os.path.isdir(".") else ""
    if folder not in sys.path:  # a method of one's own lies there; last, so that it hides nothing
        sys.path.append(folder)
    arguments, debug = _without_debug(sys.argv[1:])
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(*_message(error))
    else:
        if code == EXIT_INTERRUPTED:
            _fail("interrupted", EXIT_INTERRUPTED)
        sys.exit(code or 0)


def _without_debug(given: list[str]) -> tuple[list[str], bool]:
    """The arguments in front of a bare `--` without the flag, and whether it was there."""
    end = given.index("--") if "--" in given else len(given)
    kept = [word for word in given[:end] if word != DEBUG]
    return [*kept, *given[end:]], len(kept) < end


def _message(error: Exception) -> tuple[str, int]:
    """What happened, on one line, and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, KvtrimError):
        return text, EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    show = getattr(error, "format_message", None)
    if show is not None:  # the parser's
        context = getattr(error, "ctx", None)
        hint = f" Try: {context.command_path} --help" if context is not None else ""
        return f"{show()}{hint}", EXIT_USAGE
    if type(error).__name__ == "Abort":
        return "interrupted", EXIT_INTERRUPTED
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "DefaultCPU" in text:
        return (
            f"out of memory: {text[:200] or name}; take a smaller model, batch or prompt, or "
            "--prefill-chunk",
            EXIT_FAILED,
        )
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where} ({_place(error)}; {DEBUG} shows more)", EXIT_FAILED
    return f"{name}: {text[:300]} ({_place(error)}; {DEBUG} shows more)", EXIT_FAILED


def _place(error: Exception) -> str:
    """The file and line that raised it: of a method of one's own, if it passed through one."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (os.sep + "site-packages" + os.sep, str(Path(os.__file__).parent))
    own = [frame for frame in frames if not any(part in frame.filename for part in libraries)]
    last = (own or frames)[-1] if frames else None
    return "unknown place" if last is None else f"{Path(last.filename).name}:{last.lineno}"


def _fail(message: str, code: int) -> None:
    from kvtrim.report.format import visible  # a message may quote a file or a question

    sys.stderr.write(f"kvtrim: {visible(message)}\n")
    sys.exit(code)
