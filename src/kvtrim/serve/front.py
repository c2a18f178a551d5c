"""The front of several replicas: it passes requests on to them, and answers back.

What it looks at itself: who may come in and with how much, as the application does; which replica
a request belongs to (it says a document's name, and whoever routes finds a replica that holds it);
and what becomes of a request whose replica dies. As long as nothing of an answer was sent it goes
to another replica; a stream that had begun ends with an error event.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import aclosing
from typing import Any, Protocol, runtime_checkable

from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from kvtrim.serve.guard import failure, turn_away
from kvtrim.serve.page import page
from kvtrim.serve.relay import (
    Begun,
    Passed,
    document_of,
    is_upload,
    plain_scope,
    scope_of,
    subject,
)
from kvtrim.serve.request import Refused

log = logging.getLogger("kvtrim.serve.requests")

_ATTEMPTS = 3  # replicas that may die of one request
_PATIENCE_S = 10.0  # until one takes a request, before it is asked whether there is any
_RETRY_S = 5
_REMEMBERED = 1024  # uploads whose replica is known
_PARSED = 1 << 20  # bytes of a body that is parsed where others wait meanwhile

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Died(Exception):
    """The replica that had a request is no more."""


@runtime_checkable
class Replicas(Protocol):
    """Whoever finds replicas for requests."""

    def answer(self, request: Passed, document: str) -> AsyncGenerator[Any, None]:
        """The replica's name, as soon as it took the request; then `Begun`; then bytes.

        Closing the generator ends the request.

        Args:
            document: what it is about, so that it goes where that is held; "" for nothing.

        Raises:
            Died: the replica did.
            Refused: too many requests wait.
        """
        ...

    async def answer_all(self, request: Passed) -> list[Begun]:
        """The response of every replica that is there."""
        ...


class Front:
    """An ASGI application that passes requests on.

    Args:
        api_key: as the application's.
        deadline_s: within which a replica has to take a request, which has as long again.
        patience_s: until a request is refused when there is no replica.
        long: characters of a first message; conversations of longer ones stay where they are.
    """

    def __init__(
        self,
        replicas: Replicas,
        api_key: str | None = None,
        deadline_s: float = 600.0,
        patience_s: float = _PATIENCE_S,
        long: int = 2048,
    ):
        self._replicas, self._key, self._long = replicas, api_key, long
        self._deadline_s, self._patience_s = deadline_s, patience_s
        self._counted = (0.0, 0)  # when, and how many replicas were there
        self._uploads: OrderedDict[str, str] = OrderedDict()  # who took the last of a name
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "kvtrim_front_requests", "Requests by status.", ["status"], registry=own
        )
        self._again = Counter(
            "kvtrim_front_again", "Requests passed on again, since a replica died.", registry=own
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        start, note = time.perf_counter(), {"path": "other", "status": 499, "replica": None}
        request = Http(scope, receive)
        response = turn_away(request, self._key)
        try:
            if response is not None:
                note["status"] = response.status_code
                await response(scope, receive, send)
                return
            body = await request.body()
            work = asyncio.ensure_future(self._answer(request, body, send, note))
            gone = asyncio.ensure_future(_wait_for_close(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        except ClientDisconnect:
            return
        finally:
            self._requests.labels(str(note["status"])).inc()
            seconds = round(time.perf_counter() - start, 4)
            log.info(
                "request", extra={"facts": {"method": request.method, **note, "seconds": seconds}}
            )

    async def _answer(self, request: Http, body: bytes, send: Send, note: dict[str, Any]) -> None:
        """Answer a request, and note for the log what became of it."""
        passed = Passed(scope_of(request), body)
        try:
            if (joint := self._joint(request)) is not None:
                begun = await joint(passed)
                note |= {"path": begun.route, "status": begun.status}
                await _send(begun, send)
                return
            await self._pass_on(passed, send, note)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("the front failed", exc_info=error)
            response = failure(error)
            note["status"] = response.status_code
            await _send(_wrap(response), send)

    # One replica's

    async def _pass_on(self, passed: Passed, send: Send, note: dict[str, Any]) -> None:
        about = await self._about(passed)
        end = time.monotonic() + self._deadline_s
        for _ in range(_ATTEMPTS):
            async with aclosing(self._replicas.answer(passed, about)) as parts:
                try:
                    note["replica"] = await self._take(parts, end)
                    if is_upload(passed):
                        self._remember(about, note["replica"])
                    begun = await anext(parts)
                except Died:
                    self._again.inc()
                    continue
                note |= {"path": begun.route, "status": begun.status}
                await _send(begun, send)
                if begun.more:
                    await self._stream(parts, send, note)
                return
        raise Refused("replicas ended while they answered; try again in a moment", 503, _RETRY_S)

    async def _stream(
        self, parts: AsyncGenerator[Any, None], send: Send, note: dict[str, Any]
    ) -> None:
        """The rest of a stream; an event says so if there is no more of it."""
        try:
            async for part in parts:
                await send(_body(part, more=True))
        except Exception as error:
            if not isinstance(error, Died):
                log.exception("the front failed", exc_info=error)
            note["status"] = 500
            lost = json.loads(bytes(failure(error).body))
            await send(_body(f"data: {json.dumps(lost)}\n\n".encode(), more=True))
        await send(_body(b"", more=False))

    async def _take(self, parts: AsyncGenerator[Any, None], end: float) -> str:
        """Who took a request.

        Raises:
            Refused: no replica is there, or none had a place for it in time.
        """
        first = asyncio.ensure_future(anext(parts))
        try:
            while True:
                left = end - time.monotonic()
                await asyncio.wait({first}, timeout=min(self._patience_s, max(0.0, left)))
                if first.done():
                    return first.result()
                if left <= 0:
                    raise Refused("the request was not taken by its deadline", 504)
                if not await self._count():
                    raise Refused("no replica is there; try again in a moment", 503, _RETRY_S)
        finally:
            first.cancel()
            await asyncio.wait({first})

    async def _about(self, passed: Passed) -> str:
        if len(passed.body) > _PARSED:
            return await run_in_threadpool(subject, passed, self._long)
        return subject(passed, self._long)

    def _remember(self, name: str, replica: str) -> None:
        self._uploads[name] = replica
        self._uploads.move_to_end(name)
        if len(self._uploads) > _REMEMBERED:
            self._uploads.popitem(last=False)

    # All replicas'

    def _joint(self, request: Http) -> Callable[[Passed], Awaitable[Begun]] | None:
        """What answers for all replicas together; None where one is enough."""
        path, method = request.scope["path"], request.method
        one = bool(document_of(path))
        if path == "/health":
            return self._health
        if path == "/" and method == "GET":
            return self._page
        if path == "/metrics":
            return self._metrics
        if path == "/v1/documents" and method == "GET":
            return self._documents
        if one and method in ("GET", "DELETE"):
            return self._document
        return self._first if path.startswith("/v1/models") and method == "GET" else None

    async def _all(self, passed: Passed) -> list[Begun]:
        said = await self._replicas.answer_all(passed)
        if not said:
            raise Refused("no replica is there; try again in a moment", 503, _RETRY_S)
        return said

    async def _count(self) -> int:
        """How many replicas are there and well; asked once a second at most."""
        at, count = self._counted
        if time.monotonic() - at > 1.0:
            said = await self._replicas.answer_all(Passed(plain_scope("GET", "/health"), b""))
            count = sum(each.status == 200 for each in said)
            self._counted = time.monotonic(), count
        return count

    async def _health(self, passed: Passed) -> Begun:
        count = await self._count()
        body = {"status": "ok" if count else "no replica", "replicas": count}
        headers = {} if count else {"Retry-After": str(_RETRY_S)}
        return _wrap(JSONResponse(body, 200 if count else 503, headers), "/health")

    async def _page(self, passed: Passed) -> Begun:
        return _wrap(page(), "/")

    async def _metrics(self, passed: Passed) -> Begun:
        said = await self._all(passed)
        pages = {each.replica: each.body for each in said if each.status == 200}
        page = await run_in_threadpool(_join_pages, self._registry, pages)
        return _wrap(Response(page, media_type="text/plain; version=0.0.4"), "/metrics")

    async def _first(self, passed: Passed) -> Begun:
        return min(await self._all(passed), key=lambda each: each.status)

    async def _documents(self, passed: Passed) -> Begun:
        """The library's documents, and those that any replica is reading."""
        said = [json.loads(each.body)["data"] for each in await self._all(passed)]
        ready = [each for each in said[0] if each["status"] == "ready"]
        reading = [each for own in said for each in own if each["status"] != "ready"]
        return _wrap(JSONResponse({"object": "list", "data": ready + reading}), "/v1/documents")

    async def _document(self, passed: Passed) -> Begun:
        """What the replica says that took its last upload, else the one that knows most of it."""
        said = await self._all(passed)
        name = document_of(passed.scope["path"])
        whose = self._uploads.get(name)

        def rank(each: Begun) -> tuple[int, bool, bool]:
            return each.status, b'"failed"' in each.body[:400], b'"ready"' in each.body[:400]

        if passed.scope["method"] == "GET":
            own = next((each for each in said if each.replica == whose), None)
            if own is not None and own.status == 200:
                return own
        return min(said, key=rank)


# Metrics


class _Joined(Collector):
    """What several servers count, each under its name."""

    def __init__(self, pages: Mapping[str, bytes]):
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for name, text in self._pages.items():
            for own in text_string_to_metric_families(text.decode()):
                joined = Metric(own.name, own.documentation, own.type)
                joined = found.setdefault(own.name, joined)
                for each in own.samples:
                    joined.add_sample(each.name, {**each.labels, "replica": name}, each.value)
        yield from found.values()


def _join_pages(own: CollectorRegistry, pages: Mapping[str, bytes]) -> bytes:
    """A front's own counters, and what each replica counts with its name as one more label."""
    joined = CollectorRegistry()
    joined.register(_Joined(pages))
    return generate_latest(own) + generate_latest(joined)


# Responses


def _wrap(response: Response, route: str = "other") -> Begun:
    return Begun("", response.status_code, response.raw_headers, bytes(response.body), route)


def _body(content: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def _send(begun: Begun, send: Send) -> None:
    await send({"type": "http.response.start", "status": begun.status, "headers": begun.headers})
    await send(_body(begun.body, begun.more))


async def _wait_for_close(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
