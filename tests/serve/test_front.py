"""A front passes requests on: to whom, what becomes of them when a replica dies, who may come."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx2
import pytest

from kvtrim.serve.front import Died, Front
from kvtrim.serve.relay import Begun, Passed, plain_scope, subject
from kvtrim.serve.request import Refused

KEY = "a-key-of-sorts"
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]


def begun(replica, body, status=200, headers=JSON, more=False, route="/route"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Begun(replica, status, headers, body, route, more)


class Fake:
    """Replicas that do in turn what they are told; `all` is what every one says."""

    def __init__(self, *turns, all=()):
        self.turns, self.all, self.asked, self.ended = list(turns), list(all), [], 0

    async def answer(self, request, document):
        self.asked.append((request, document))
        try:
            for part in self.turns.pop(0):
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    await asyncio.Future()
                yield part
        finally:
            self.ended += 1

    async def answer_all(self, request):
        return self.all


@asynccontextmanager
async def client(replicas, **options):
    transport = httpx2.ASGITransport(app=Front(replicas, **options))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as one:
        yield one


def ask(replicas, method="POST", path="/v1/chat/completions", body=None, headers=(), **options):
    async def main():
        async with client(replicas, **options) as one:
            content = json.dumps(body or {"model": "@manual"}) if method != "GET" else None
            return await one.request(method, path, content=content, headers=dict(headers))

    return asyncio.run(main())


def test_what_died_before_the_first_byte_is_asked_of_another():
    whole = begun("b", {"said": 1})
    for dying in ([Died()], ["a", Died()]):
        replicas = Fake(dying, ["b", whole])
        got = ask(replicas)
        assert got.status_code == 200 and got.json() == {"said": 1}
        assert len(replicas.asked) == replicas.ended == 2
        assert [document for _, document in replicas.asked] == ["manual"] * 2


def test_a_request_that_ends_every_replica_is_given_up():
    replicas = Fake(*[["a", Died()]] * 9)
    got = ask(replicas)
    assert got.status_code == 503 and int(got.headers["retry-after"]) >= 1
    assert len(replicas.asked) == 3


def test_a_stream_that_had_begun_ends_with_an_error_and_is_not_asked_again():
    first = begun("a", b"data: 1\n\n", headers=EVENTS, more=True)
    replicas = Fake(["a", first, b"data: 2\n\n", Died()])
    got = ask(replicas)
    *events, last = got.text.strip().split("\n\n")
    assert events == ["data: 1", "data: 2"] and len(replicas.asked) == 1
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_nobody_there_is_said_so_and_a_full_house_is_waited_for():
    got = ask(Fake([None]), patience_s=0.01)
    assert got.status_code == 503 and int(got.headers["retry-after"]) >= 1
    well = [begun("a", {"status": "ok"})]
    got = ask(Fake([None], all=well), patience_s=0.01, deadline_s=0.05)
    assert got.status_code == 504
    got = ask(Fake([Refused("many wait", 429, 7)]))
    assert got.status_code == 429 and got.headers["retry-after"] == "7"
    assert ask(Fake(), "GET", "/health").status_code == 503
    got = ask(Fake(all=well * 2), "GET", "/health")
    assert got.json() == {"status": "ok", "replicas": 2}
    assert ask(Fake(), "GET", "/v1/models").status_code == 503


def test_a_client_that_leaves_ends_the_request_where_it_is():
    replicas = Fake(["a", None])

    async def main():
        front, sent = Front(replicas), asyncio.Event()
        scope = {
            **plain_scope("GET", "/v1/documents/x/kept"),
            "headers": [(b"host", b"localhost")],
        }
        given = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive():
            if (message := next(given, None)) is not None:
                return message
            await sent.wait()
            return {"type": "http.disconnect"}

        async def leave():
            while not replicas.asked:
                await asyncio.sleep(0.01)
            assert not replicas.ended
            sent.set()

        await asyncio.wait_for(asyncio.gather(front(scope, receive, print), leave()), 10)

    asyncio.run(main())
    assert replicas.ended == 1


def test_keys_names_and_sizes_are_looked_at_before_anything_is_passed_on():
    replicas = Fake(["a", begun("a", {})])
    assert ask(replicas, api_key=KEY).status_code == 401
    wrong = {"authorization": f"Bearer {KEY}x"}
    assert ask(replicas, api_key=KEY, headers=wrong).status_code == 401
    assert ask(replicas, headers={"host": "evil.example"}).status_code == 403
    assert ask(replicas, headers={"content-length": str(1 << 40)}).status_code == 413
    assert not replicas.asked
    right = {"authorization": f"Bearer {KEY}", "host": "models.example"}
    assert ask(replicas, api_key=KEY, headers=right).status_code == 200
    names = [name for name, _ in replicas.asked[0][0].scope["headers"]]
    assert b"host" in names and b"authorization" not in names


def test_requests_say_which_document_they_are_about():
    long = [{"role": "user", "content": "x" * 3000}]
    more = [*long, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]

    def about(path, body=None, method="POST"):
        body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body)
        body = body if isinstance(body, bytes) else body.encode()
        return subject(Passed(plain_scope(method, path), body), 2048)

    chat = "/v1/chat/completions"
    assert about(chat, {"model": "m@manual", "messages": long}) == "manual"
    assert about("/v1/responses", {"model": "@manual", "input": "Who?"}) == "manual"
    assert about("/v1/documents/manual", b"text", "PUT") == "manual"
    assert about("/v1/documents/manual/kept", method="GET") == "manual"
    assert about("/v1/documents", {"name": "manual"}) == "manual"
    talk = about(chat, {"model": "m", "messages": long})
    assert talk == about(chat, {"model": "m", "messages": more}) and ":" in talk
    assert talk != about(chat, {"model": "m", "messages": [{**long[0], "content": "y" * 3000}]})
    assert about(chat, {"model": "m", "messages": more[1:]}) == ""
    for nothing in (b"{", b"[" * 9000, b"[]", b'{"model": 1}', b'{"model": "m@../x"}', b"\xff"):
        assert about(chat, nothing) == ""


def test_the_replica_that_took_an_upload_speaks_for_it():
    gone = begun("a", {"error": {}}, status=404)
    reading = begun("b", {"object": "document", "name": "x", "status": "reading"})
    failed = begun("b", {"object": "document", "name": "x", "status": "failed"})
    ready = begun("a", {"object": "document", "name": "x", "status": "ready"})
    path = "/v1/documents/x"
    assert ask(Fake(all=[gone, reading]), "GET", path).json()["status"] == "reading"
    assert ask(Fake(all=[ready, reading]), "GET", path).json()["status"] == "reading"
    assert ask(Fake(all=[failed, ready]), "GET", path).json()["status"] == "ready"
    assert ask(Fake(all=[gone, gone]), "GET", path).status_code == 404

    async def main(replicas):
        async with client(replicas) as one:
            assert (await one.put(path, content="text")).status_code == 202
            return (await one.get(path)).json()["status"]

    taken = ["b", begun("b", {}, status=202)]
    assert asyncio.run(main(Fake(taken, all=[ready, failed]))) == "failed"
    assert asyncio.run(main(Fake(["a", taken[1]], all=[ready, failed]))) == "ready"


def test_lists_and_counters_are_of_all_replicas():
    ready, reading = {"name": "x", "status": "ready"}, {"name": "y", "status": "reading"}
    said = [begun("a", {"data": [ready]}), begun("b", {"data": [ready, reading]})]
    assert ask(Fake(all=said), "GET", "/v1/documents").json()["data"] == [ready, reading]
    page = (
        b"# HELP kvtrim_waiting In the queue.\n# TYPE kvtrim_waiting gauge\nkvtrim_waiting 3.0\n"
    )
    text = ask(Fake(all=[begun("a", page), begun("b", page)]), "GET", "/metrics").text
    assert 'kvtrim_waiting{replica="a"} 3.0' in text and 'kvtrim_waiting{replica="b"}' in text
    assert text.count("# TYPE kvtrim_waiting gauge") == 1 and "kvtrim_front_again_total" in text


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_document_is_asked_of_all_replicas(method):
    done = begun("b", {"deleted": True})
    got = ask(Fake(all=[begun("a", {}, status=404), done]), method, "/v1/documents/x")
    assert got.json() == {"deleted": True}
