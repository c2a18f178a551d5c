"""The command line: parse, call, print, exit.

Every error leaves by one door: one line that says what happened and an exit code. `--debug`,
anywhere among the arguments, keeps the traceback of errors that nobody foresaw.
"""

import os
import sys
import traceback
from pathlib import Path

from kvtrim.cli.app import app
from kvtrim.errors import KvtrimError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
DEBUG = "--debug"


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
