"""The command line: parse, call, print, exit."""

import os
import sys

from kvtrim.cli.app import app
from kvtrim.errors import KvtrimError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run a command; every expected error is one line and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        _fail(str(error), EXIT_USAGE)
    except KvtrimError as error:
        _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        _parse_error(error)
    else:
        if code == EXIT_INTERRUPTED:
            _fail("interrupted", EXIT_INTERRUPTED)
        sys.exit(code or 0)


def _parse_error(error: Exception) -> None:
    """Report what the parser says of a wrong flag; anything else is a bug and keeps its trace."""
    show = getattr(error, "format_message", None)
    if show is None:
        if type(error).__name__ == "Abort":
            _fail("interrupted", EXIT_INTERRUPTED)
        raise error
    context = getattr(error, "ctx", None)
    hint = f" Try: {context.command_path} --help" if context is not None else ""
    _fail(f"{show()}{hint}", EXIT_USAGE)


def _fail(message: str, code: int) -> None:
    from kvtrim.report.format import visible  # a message may quote a file or a question

    sys.stderr.write(f"kvtrim: {visible(message)}\n")
    sys.exit(code)
