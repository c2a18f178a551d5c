"""The HTTP application: OpenAI's endpoints, documents, health, metrics, a page."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.serve import protocol, wire
from kvtrim.serve.guard import error_response, failure, turn_away
from kvtrim.serve.library import Entry
from kvtrim.serve.metrics import Metrics
from kvtrim.serve.page import page
from kvtrim.serve.request import Done
from kvtrim.serve.service import Asking, Service

_DRAIN_S = 30.0
log = logging.getLogger("kvtrim.serve.requests")


def application(
    service: Service, api_key: str | None = None, behind_front: bool = False
) -> FastAPI:
    """The application of one service, started and drained with it.

    Args:
        api_key: asked of every request but those of the page itself and `/health`.
        behind_front: requests come from a front that looked at them already (`serve.front`).
    """
    metrics = Metrics(service.scheduler)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await run_in_threadpool(service.scheduler.drain, _DRAIN_S)

    app = FastAPI(title="kvtrim", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.metrics = metrics
    check = (lambda request: None) if behind_front else partial(turn_away, api_key=api_key)
    app.middleware("http")(_guard(metrics, check))
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(KvtrimError, _refusal)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failure)
    _add_answers(app, service, metrics)
    _add_documents(app, service)

    @app.get("/health")
    @app.head("/health")
    def health() -> JSONResponse:
        alive = service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    @app.get("/metrics")
    def metrics_page() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return service.model(service.document(name))

    app.get("/")(page)
    app.head("/")(page)
    return app


# Who may come in, and with how much


def _guard(metrics: Metrics, check: Callable[[Http], Response | None]) -> Callable[..., Any]:
    async def guard(request: Http, call_next: Callable[..., Any]) -> Response:
        start = time.perf_counter()
        response = check(request)
        if response is None:
            response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "other")
        metrics.requests.labels(route, str(response.status_code)).inc()
        facts = {
            "method": request.method,
            "path": route,  # never what was asked for: it may say anything
            "status": response.status_code,
            "seconds": round(time.perf_counter() - start, 4),
        }
        log.info("request", extra={"facts": facts})
        return response

    return guard


async def _bad_request(request: Http, error: Any) -> JSONResponse:
    found = max(error.errors(), key=lambda each: len(each["loc"]))  # of several forms, the nearest
    where, kind = found["loc"][1:], request.headers.get("content-type", "")
    if found["type"] == "json_invalid":
        why = found.get("ctx", {}).get("error", "")
        message = f"the body is no JSON: {why} at character {where[-1] if where else 0}"
    elif found["type"] == "value_error":
        message = str(found["ctx"]["error"])
    elif not where and not kind.partition(";")[0].strip().endswith("json"):
        message = "send JSON, and say so: Content-Type: application/json"
    else:
        message = f"{'.'.join(map(str, where))[:200] or 'body'}: {found['msg'][:300]}"
    return error_response(message, 400)


_PLAIN = {
    400: "the body cannot be read; send JSON",
    404: "there is nothing here; OpenAI's endpoints are under /v1 (GET /v1/models)",
    405: "there is no {method} here",
}


async def _http(request: Http, error: Any) -> JSONResponse:
    message = _PLAIN.get(error.status_code, str(error.detail)).format(method=request.method)
    headers = dict(error.headers or {})
    if allowed := headers.get("Allow"):
        message += f"; use {allowed}"
    response = error_response(message, error.status_code)
    response.headers.update(headers)
    return response


async def _failure(request: Http, error: Exception) -> JSONResponse:
    return failure(error)  # the log has it


async def _refusal(request: Http, error: Any) -> JSONResponse:
    return failure(error)


# Answers


def _add_answers(app: FastAPI, service: Service, metrics: Metrics) -> None:
    async def answer(http: Http, asking: Asking, form: wire.Form, stream: bool) -> Response:
        lines = _events(service, metrics, asking, form)
        with ExitStack() as stack:
            stack.enter_context(asking)
            gone = asyncio.ensure_future(_wait_for_close(http))
            first = asyncio.ensure_future(anext(lines) if stream else asking.choices())
            try:
                await asyncio.wait({gone, first}, return_when=asyncio.FIRST_COMPLETED)
                if not first.done():
                    return error_response("the client went away", 499)
                got = first.result()
            except KvtrimError:
                raise
            except Exception as error:
                return failure(error)
            finally:
                gone.cancel()
                first.cancel()
            if isinstance(got, str):
                stack.pop_all()  # the stream goes on
                return StreamingResponse(_follow(got, lines), media_type="text/event-stream")
        for each in got:
            metrics.count_answer(each.usage)
        return JSONResponse(form.whole(got))

    @app.post("/v1/chat/completions")
    async def chat(asked: protocol.Chat, http: Http) -> Response:
        top = asked.top_logprobs
        if top is not None and not asked.logprobs:
            raise UsageError("top_logprobs needs logprobs=true")
        most = asked.max_completion_tokens
        most = asked.max_tokens if most is None else most
        logprobs = (top or 0) if asked.logprobs else None
        sampling = service.sampling_of(asked, most, logprobs)
        said = await run_in_threadpool(_messages, asked.messages)
        asking = await service.chat(asked, said, sampling)
        return await answer(http, asking, wire.Chat(asked, service), bool(asked.stream))

    @app.post("/v1/completions")
    async def complete(asked: protocol.Completion, http: Http) -> Response:
        sampling = service.sampling_of(asked, asked.max_tokens, asked.logprobs)
        asking = await service.complete(asked, sampling)
        return await answer(http, asking, wire.Completion(asked, service), bool(asked.stream))

    @app.post("/v1/responses")
    async def respond(asked: protocol.Response, http: Http) -> Response:
        if asked.previous_response_id is not None:
            raise UsageError("responses are not stored; send the conversation as input")
        if (asked.n or 1) != 1:
            raise UsageError("a response is one answer; leave n out")
        given = asked.input
        if isinstance(given, str):
            said = [{"role": "user", "content": given}]
        else:
            said = await run_in_threadpool(_messages, given)
        if asked.instructions:
            said.insert(0, {"role": "system", "content": asked.instructions})
        sampling = service.sampling_of(asked, asked.max_output_tokens, None)
        asking = await service.chat(asked, said, sampling)
        return await answer(http, asking, wire.Response(asked, service), bool(asked.stream))


def _messages(messages: list[protocol.Message]) -> list[dict[str, str]]:
    try:
        said = [{"role": each.role, "content": each.text()} for each in messages]
    except ValueError as error:
        raise UsageError(str(error)) from None
    for each in said:
        each["role"] = "system" if each["role"] == "developer" else each["role"]
    return said


async def _wait_for_close(http: Http) -> None:
    """Returns when the client is gone."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)


async def _events(
    service: Service, metrics: Metrics, asking: Asking, form: wire.Form
) -> AsyncGenerator[str, None]:
    """Server-sent events of answers as they come; a client that leaves ends them.

    There is none before the first token is there: until then another replica may take over, and
    what goes wrong is raised, so that it is the response's status.
    """
    with asking:
        before, sent = list(form.begin(asking.count)), False
        try:
            async for number, event in asking.events():
                if isinstance(event, Done):
                    metrics.count_answer(event.usage)
                for line in (*before, *form.event(number, event)):
                    yield line
                    sent = True
                before = []
        except Exception as error:
            if not sent:
                raise
            body = json.loads(bytes(failure(error).body))
            yield f"data: {json.dumps(body)}\n\n"
            return
        for event in form.end():
            yield event


async def _follow(first: str, lines: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """All of a stream that has begun."""
    async with aclosing(lines):
        yield first
        async for line in lines:
            yield line


# Documents


def _add_documents(app: FastAPI, service: Service) -> None:
    async def upload(name: str, text: str, how: Any, wait: bool) -> JSONResponse:
        done = service.upload(name, text, how)
        if not wait:
            return JSONResponse({"object": "document", "name": name, "status": "reading"}, 202)
        return JSONResponse(_document(service, await asyncio.shield(done)))

    @app.post("/v1/documents")
    async def add(asked: protocol.NewDocument) -> JSONResponse:
        how = service.how(asked.method, asked.keep, dict(asked.settings))
        return await upload(asked.name, asked.text, how, asked.wait)

    @app.put("/v1/documents/{name}")
    async def put(
        name: str,
        http: Http,
        method: str | None = None,
        keep: str | None = None,
        wait: bool = True,
    ) -> JSONResponse:
        how = service.how(method, keep, {})
        try:
            text = (await http.body()).decode()
        except UnicodeDecodeError:
            raise UsageError("the document is not UTF-8 text; convert it first") from None
        return await upload(name, text, how, wait)

    @app.get("/v1/documents")
    def list_documents() -> dict[str, Any]:
        reading = [_upload_status(service, name) for name in list(service.uploads)]
        return {
            "object": "list",
            "data": [_document(service, e) for e in service.documents()] + reading,
        }

    @app.get("/v1/documents/{name}")
    def one(name: str) -> dict[str, Any]:
        if name in service.uploads:
            return _upload_status(service, name)
        why = service.failed.get(name)
        if why is not None:
            return {"object": "document", "name": name, "status": "failed", "error": why}
        return _document(service, service.find_document(name))

    @app.get("/v1/documents/{name}/kept")
    def show(name: str) -> HTMLResponse:
        return HTMLResponse(service.show(name))

    @app.delete("/v1/documents/{name}")
    def remove(name: str) -> dict[str, Any]:
        service.remove(name)
        return {"object": "document", "name": name, "deleted": True}


def _document(service: Service, entry: Entry) -> dict[str, Any]:
    return {
        "object": "document",
        "name": entry.name,
        "model": f"{service.id}@{entry.name}",
        "status": "ready",
        "tokens": entry.tokens,
        "characters": entry.characters,
        "method": entry.method,
        "keep": entry.keep,
        "held_bytes": entry.held_bytes,
        "full_bytes": entry.full_bytes,
        "created": int(entry.made),
        "used": int(entry.used),
        "remark": entry.remark,
    }


def _upload_status(service: Service, name: str) -> dict[str, Any]:
    upload = service.uploads.get(name)
    done, tokens = (upload.done, upload.tokens) if upload is not None else (0, 0)
    return {
        "object": "document",
        "name": name,
        "status": "reading",
        "read_tokens": done,
        "tokens": tokens,
    }
