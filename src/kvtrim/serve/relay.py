"""A request as it is passed on to a replica, what it is about, and how a response begins."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request as Http

from kvtrim.errors import UsageError
from kvtrim.serve.library import check_name

_DOCUMENT = re.compile(r"/v1/documents/([^/]+)")
_ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True)
class Passed:
    """A request as it is passed on: its ASGI scope and its body."""

    scope: dict[str, Any]
    body: bytes


@dataclass(frozen=True)
class Begun:
    """The beginning of a response; all of it unless there is `more`."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    route: str  # of the application: what was asked for, without what it was asked about
    more: bool = False


def subject(passed: Passed, long: int) -> str:
    """The name of the document that a request is about; "" for none.

    A conversation whose first message is long has a made-up name, which is none of a document.
    """
    path, method = passed.scope["path"], passed.scope["method"]
    try:
        if name := document_of(path.removesuffix("/kept")):
            return check_name(name)
        if method != "POST" or path not in (*_ANSWERS, "/v1/documents"):
            return ""
        asked = json.loads(passed.body)
        if path == "/v1/documents":
            return check_name(asked["name"])
        _, at, name = asked["model"].partition("@")
        return check_name(name) if at else _conversation(asked, long)
    except (UsageError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""  # the application says what is wrong with it


def _conversation(asked: dict[str, Any], long: int) -> str:
    """What tells a conversation from others: all up to its first message of the user."""
    said = asked.get("messages") or asked.get("input") or ""
    if not isinstance(said, list):
        return ""
    users = [number for number, each in enumerate(said) if each.get("role") == "user"]
    head = json.dumps(said[: users[0] + 1] if users else said, sort_keys=True)
    if len(head) < long:
        return ""
    return "conversation:" + hashlib.sha256(head.encode()).hexdigest()[:32]


def document_of(path: str) -> str:
    """The document that an address names; "" for none."""
    found = _DOCUMENT.fullmatch(path)
    return found[1] if found else ""


def is_upload(passed: Passed) -> bool:
    """Whether it brings a document."""
    path, method = passed.scope["path"], passed.scope["method"]
    return (method, path) == ("POST", "/v1/documents") or (
        method == "PUT" and bool(document_of(path))
    )


def scope_of(request: Http) -> dict[str, Any]:
    """What of a request's scope goes along: plain values; its key stays here."""
    given = request.scope
    own = plain_scope(request.method, given["path"])
    headers = [(n, v) for n, v in given["headers"] if n != b"authorization"]
    more = {name: given[name] for name in ("raw_path", "query_string") if name in given}
    return {**own, **more, "headers": headers}


def plain_scope(method: str, path: str) -> dict[str, Any]:
    """The ASGI scope of a plain request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": None,
        "server": ("localhost", 80),
    }
