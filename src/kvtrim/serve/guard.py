"""Who may come in, with how much, and errors as OpenAI's clients read them."""

import hmac
import ipaddress

from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.serve.request import Refused

_OPEN = {"/", "/health"}
"""What anybody may see: it tells nothing of documents or requests."""

_MOST_BYTES = 64 << 20  # of a request's body


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def turn_away(request: Http, api_key: str | None) -> Response | None:
    """Why a request goes no further; None if it does."""
    if api_key is None and not is_loopback(request.url.hostname or ""):
        return error_response(
            "this server answers to its own machine's names alone: ask for it as 127.0.0.1, or "
            "start it with --api-key",
            403,
        )
    if api_key is not None and request.url.path not in _OPEN:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if kind.lower() != "bearer" or not right:
            return error_response(
                "no API key, or a wrong one: send Authorization: Bearer KEY",
                401,
                kind="invalid_api_key",
            )
    try:
        length = int(request.headers.get("content-length", "0"))
    except ValueError:
        return error_response("the content-length is no number", 400)
    if length > _MOST_BYTES:
        return error_response(f"a body may have {_MOST_BYTES >> 20} MiB", 413)
    if request.method in ("POST", "PUT") and "content-length" not in request.headers:
        return error_response("the body's length has to be known: send content-length", 411)
    return None


def error_response(
    message: str, status: int, kind: str | None = None, retry_s: int | None = None
) -> JSONResponse:
    """An error in the words of OpenAI's API."""
    what = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": what, "param": None, "code": kind}
    headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
    return JSONResponse({"error": error}, status, headers)


def failure(error: Exception) -> JSONResponse:
    """An error as a client sees it: what it did wrong, or that it was none of its doing."""
    if isinstance(error, Refused):
        return error_response(str(error), error.status, retry_s=error.retry_s)
    if isinstance(error, UsageError):
        return error_response(str(error), 400)
    if isinstance(error, KvtrimError):
        return error_response(str(error), 409)
    return error_response("the server failed; its log says more", 500)
