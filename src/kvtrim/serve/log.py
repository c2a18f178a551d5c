"""What a server says of its requests and of what fails, on standard error."""

import json
import logging
import sys
import time
from typing import Any


class Lines(logging.Formatter):
    """One JSON object a line; nothing of a request's texts is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line."""
        own: dict[str, Any] = getattr(record, "facts", {})
        line = {"time": round(time.time(), 3), "level": record.levelname.lower(), **own}
        if not own:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def log_to_stderr() -> None:
    """Send what kvtrim's server says to standard error, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    own = logging.getLogger("kvtrim.serve")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
