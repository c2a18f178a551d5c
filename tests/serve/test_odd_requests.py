"""Whatever a client sends, it is told what is wrong and what to do, in OpenAI's words."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import models
from kvtrim.prompts import conversation
from kvtrim.serve import documents
from kvtrim.serve.library import Library
from kvtrim.serve.reading import Reading
from kvtrim.serve.request import SUBJECT, Refused
from kvtrim.serve.sampler import Sampler
from kvtrim.serve.scheduler import Limits
from kvtrim.serve.service import Defaults, Service

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
TEXT = "The cat sat on the mat and looked at the sea. " * 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Clients of servers in this process, over one library unless told otherwise."""
    testclient = pytest.importorskip("fastapi.testclient", reason="pip install 'kvtrim[serve]'")
    from kvtrim.serve.app import application

    folder, clients = tmp_path_factory.mktemp("library"), []
    model = models.tiny("llama", dtype=torch.float32)

    def begin(subject="", **limits):
        given = Library(folder), Limits(**limits), Defaults("snapkv", "48")
        app = application(Service("tiny", model, models.tokenizer(), *given))

        async def routed(scope, receive, send):
            SUBJECT.set(subject)
            await app(scope, receive, send)

        here = {"base_url": "http://localhost", "raise_server_exceptions": False}
        client = testclient.TestClient(routed, **here)
        clients.append(client)
        client.__enter__()
        return client

    yield begin
    for client in clients:
        client.__exit__()


@pytest.fixture(scope="module")
def client(start):
    return start()


def why(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, b"{nope}", "no JSON: "),
        (CHAT, b'{"a": 1' + b"0" * 5000 + b"}", "send JSON"),
        (CHAT, b"[]", "body: "),
        (CHAT, HI | {"messages": [{"role": "user", "content": [{"text": 3}]}]}, "send text"),
        (CHAT, HI | {"tool_choice": "required"}, "tool_choice is not served here; leave it out"),
        (CHAT, HI | {"response_format": {"type": "json_object"}}, "response_format is not served"),
        (CHAT, HI | {"logit_bias": {"5": 100}}, "logit_bias is not served"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "best_of": 3}, "best_of is not"),
        (RESPONSES, {"model": "tiny", "input": []}, "no messages"),
        (RESPONSES, {"model": "tiny", "input": [{"type": "item"}]}, "role: Field required"),
        (
            RESPONSES,
            {"model": "tiny", "input": "x", "text": {"format": {"type": "json_object"}}},
            "text.format is not served",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(client, path, body, said):
    body = body if isinstance(body, bytes) else json.dumps(body)
    sent = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert said in why(sent, 400)


def test_what_changes_nothing_is_passed_over(client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    odd = {"tools": tools, "tool_choice": "auto", "response_format": {"type": "text"}}
    odd |= {"logit_bias": {}, "temperature": 1e-300, "nobody_knows": 1}
    said = [client.post(CHAT, json=asked).json()["choices"] for asked in (HI, HI | odd)]
    assert said[0] == said[1]


def test_a_body_that_is_not_called_json(client):
    sent = client.post(CHAT, data=HI | {"messages": "Hi"})
    assert "Content-Type: application/json" in why(sent, 400)


def test_addresses_and_methods_that_are_not_there(client):
    assert "GET /v1/models" in why(client.get("/v1/embeddings"), 404)
    answer = client.get(CHAT)
    assert "use POST" in why(answer, 405) and answer.headers["Allow"] == "POST"
    assert client.head("/").status_code == client.head("/health").status_code == 200


def test_a_fault_of_the_server_is_told_in_the_same_words(client, monkeypatch):
    monkeypatch.setattr(Service, "models", lambda self: 1 / 0)
    answer = client.get("/v1/models")
    assert "log" in why(answer, 500) and answer.json()["error"]["type"] == "server_error"


def test_an_answer_that_fails_ends_no_other(client, monkeypatch):
    choose = Sampler.choose

    def fail(self, *given):
        if self._how.seed == 13:
            raise ValueError
        return choose(self, *given)

    monkeypatch.setattr(Sampler, "choose", fail)
    got = []
    long = HI | {"max_tokens": 300, "ignore_eos": True}
    other = threading.Thread(target=lambda: got.append(client.post(CHAT, json=long)))
    other.start()
    while not any(line.endswith(" 1.0") for line in answering(client)):
        time.sleep(0.01)
    assert why(client.post(CHAT, json=HI | {"seed": 13}), 500)
    other.join()
    assert got[0].json()["usage"]["completion_tokens"] == 300


def answering(client):
    page = client.get("/metrics").text.splitlines()
    return [line for line in page if line.startswith("kvtrim_answering ")]


def test_a_stream_that_cannot_begin_has_the_status_of_its_error(start):
    small = start(memory=2000)
    for stream in (False, True):
        said = why(small.post(CHAT, json=HI | {"stream": stream}), 413)
        assert "KiB" in said and "may hold 2.0 KiB in all (--memory)" in said


def test_who_uploads_is_told_that_it_was_removed_meanwhile(client, monkeypatch):
    reading = threading.Event()

    def read(self, model, count):
        reading.set()
        time.sleep(0.02)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "read", read)
        got = []
        sent = threading.Thread(
            target=lambda: got.append(client.put("/v1/documents/slow", content=TEXT))
        )
        sent.start()
        assert reading.wait(30)
        assert client.delete("/v1/documents/slow").json()["deleted"]
        sent.join(30)
        assert "removed while it was read" in why(got[0], 409)
    assert client.get("/v1/documents/slow").status_code == 404
    assert client.put("/v1/documents/slow", content=TEXT).json()["status"] == "ready"


@pytest.mark.parametrize("step", ["keep", "verify"])  # of a new document, of one that is known
def test_what_is_removed_while_it_is_written_is_gone(client, monkeypatch, step):
    act = getattr(documents, step)

    def removed_meanwhile(*given):
        done = act(*given)
        assert client.delete("/v1/documents/late").json()["deleted"]
        return done

    if step == "verify":
        client.put("/v1/documents/known", content=TEXT + "Late.")
    with monkeypatch.context() as patch:
        patch.setattr(documents, step, removed_meanwhile)
        sent = client.put("/v1/documents/late", content=TEXT + "Late.")
    assert "removed while it was read" in why(sent, 409)
    assert client.get("/v1/documents/late").status_code == 404
    assert client.put("/v1/documents/late", content=TEXT + "Late.").status_code == 200
    client.delete("/v1/documents/late")


def test_long_texts_keep_nobody_else_waiting(client, monkeypatch):
    for name, path, asked in (
        ("encode", CHAT, HI),
        ("encode", RESPONSES, {"model": "tiny", "input": "Hi", "max_output_tokens": 3}),
        ("encode_plain", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 3}),
    ):
        encode, begun, done = getattr(conversation, name), threading.Event(), threading.Event()

        def slow(*given, encode=encode, begun=begun, done=done, **how):
            begun.set()
            assert done.wait(20)
            return encode(*given, **how)

        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            patch.setattr(conversation, name, slow)
            sent = pool.submit(client.post, path, json=asked)
            assert begun.wait(30)
            other = ThreadPoolExecutor(1).submit(client.get, "/health")
            try:
                assert other.result(10).status_code == 200
            finally:
                done.set()
            assert sent.result(30).status_code == 200


def test_what_another_server_removed_is_let_go_of(start):
    one, two = start("shared"), start("shared")
    assert one.put("/v1/documents/shared", content=TEXT + "Shared.").json()["status"] == "ready"
    assert two.post(CHAT, json=HI | {"model": "@shared"}).status_code == 200

    def held(client):
        page = client.get("/metrics").text.splitlines()
        return next(line for line in page if line.startswith("kvtrim_documents "))

    assert held(one) == held(two) == "kvtrim_documents 1.0"
    assert one.delete("/v1/documents/shared").status_code == 200
    assert two.delete("/v1/documents/shared").status_code == 404
    end = time.monotonic() + 30
    while not held(one) == held(two) == "kvtrim_documents 0.0":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_upload_is_known_until_it_is_done_whatever_became_of_the_one_before(tmp_path):
    model = models.tiny("llama", dtype=torch.float32)
    given = Library(tmp_path), Limits(), Defaults("snapkv", "48")
    service = Service("tiny", model, models.tokenizer(), *given)

    async def upload_twice():
        how = service.how(None, None, {})
        first = service.upload("twice", TEXT, how)
        service.remove("twice")
        service.upload("twice", TEXT, how)  # before the loop heard of the removal
        with pytest.raises(Refused, match="removed"):
            await first
        assert "twice" in service.uploads

    asyncio.run(upload_twice())
