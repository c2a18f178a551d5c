"""Real clients against a server that was started as a process."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from served import KEY, launch, send

import kvtrim
import models
from late import Late

openai = Late("openai")
TEXT = "Chapter 1. " + "The cat sat on the mat and looked at the sea. " * 4
HOSTILE = "An end </s> and a <s> beginning. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(folder, model_folder):
    process, url = launch(folder, model_folder, "--compress-above", "150", "--batch", "16")
    yield url
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(40) in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def manual(url, client, model_folder):
    made = send(url, "PUT", "/v1/documents/manual", TEXT.encode())[1]
    assert made["status"] == "ready" and made["method"] == "snapkv"
    return made


@pytest.fixture(scope="module")
def local(model_folder):
    return kvtrim.load(model_folder)


def said(text):
    return [{"role": "user", "content": text}]


SHORT = {"max_tokens": 6, "extra_body": {"ignore_eos": True}}


def test_a_document_is_a_model_and_answers_as_generate(client, manual, local, model_folder):
    model = f"{model_folder.name}@manual"
    assert [each.id for each in client.models.list()] == [model_folder.name, model]
    for name in (model, "@manual", f"{model_folder}@manual"):  # as requests may name it
        assert client.models.retrieve(name).id == model
    got = client.chat.completions.create(model=model, messages=said("Who?"), **SHORT)
    loaded, tokenizer = local
    cache = kvtrim.compress(loaded, tokenizer, TEXT, method="snapkv", keep=48)
    alone = kvtrim.generate(
        loaded, tokenizer, cache, "Who?", max_new_tokens=6, eos_token_id=None
    ).answers[0]
    assert got.choices[0].message.content.strip() == alone.text
    assert got.choices[0].finish_reason == "length"
    assert got.usage.prompt_tokens == alone.prompt_tokens
    assert got.usage.prompt_tokens_details.cached_tokens == manual["tokens"]
    assert got.usage.kvtrim["read_tokens"] == alone.prompt_tokens - manual["tokens"]
    assert got.usage.kvtrim["held_bytes"] < got.usage.kvtrim["full_bytes"]


def test_streams_are_the_whole_answer_in_pieces(client, manual, model_folder):
    model = f"{model_folder.name}@manual"
    asked = dict(model=model, messages=said("Why?"), n=2, temperature=1.0, seed=3, **SHORT)
    whole = client.chat.completions.create(**asked)
    texts, usage, ends = ["", ""], None, []
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for each in chunk.choices:
            texts[each.index] += each.delta.content or ""
            ends += [each.finish_reason] if each.finish_reason else []
    assert texts == [each.message.content for each in whole.choices]
    assert texts[0] != texts[1] and ends == ["length"] * 2 and usage.completion_tokens == 12


def test_answers_to_one_prompt_are_those_alone_and_read_it_once(client, url, model_folder):
    def counted(kind):
        page = send(url, "GET", "/metrics")[1]
        return float(re.search(rf'kvtrim_tokens_total{{kind="{kind}"}} (\S+)', page)[1])

    asked = dict(model=model_folder.name, **SHORT)
    one = client.chat.completions.create(**asked, messages=said("Where is it now?"))
    before, text = counted("read"), one.choices[0].message.content
    three = client.chat.completions.create(**asked, messages=said("Where is it not?"), n=3)
    assert counted("read") - before == three.usage.kvtrim["read_tokens"]
    assert three.usage.kvtrim["read_tokens"] < one.usage.prompt_tokens
    assert three.usage.completion_tokens == 18
    same = client.chat.completions.create(**asked, messages=said("Where is it now?"), n=3)
    assert [each.message.content for each in same.choices] == [text] * 3
    drawn = dict(asked, messages=said("Where is it now?"), temperature=1.0)
    alone = [client.chat.completions.create(**drawn, seed=seed) for seed in (7, 8)]
    both = client.chat.completions.create(**drawn, seed=7, n=2)
    texts = [each.message.content for each in both.choices]
    assert texts == [each.choices[0].message.content for each in alone] and texts[0] != texts[1]
    pair = client.completions.create(model=model_folder.name, prompt=["One", "Two"], n=2, **SHORT)
    each = [
        client.completions.create(model=model_folder.name, prompt=text, **SHORT)
        for text in ("One", "Two")
    ]
    assert pair.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in each)
    assert [c.text for c in pair.choices] == [e.choices[0].text for e in each for _ in range(2)]


def test_sixteen_at_once_get_what_each_gets_alone(client, manual, url, model_folder):
    other = send(url, "PUT", "/v1/documents/hostile?keep=40", HOSTILE.encode())[1]
    assert other["status"] == "ready"
    names = [f"{model_folder.name}{end}" for end in ("@manual", "@hostile", "", "@manual")] * 4
    questions = [f"Who {n}?" for n in range(16)]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=60) as own:
            one = own.chat.completions.create
            return await asyncio.gather(
                *(one(model=name, messages=said(q), **SHORT)
                  for name, q in zip(names, questions, strict=True))
            )  # fmt: skip

    together = [each.choices[0].message.content for each in asyncio.run(ask())]
    alone = [
        client.chat.completions.create(model=name, messages=said(q), **SHORT)
        .choices[0].message.content
        for name, q in zip(names, questions, strict=True)
    ]  # fmt: skip
    assert together == alone


def test_conversations_and_long_first_messages_are_reused(client, model_folder):
    first = client.chat.completions.create(
        model=model_folder.name, messages=said(TEXT + "Who?"), **SHORT
    )
    assert first.usage.kvtrim["reused_tokens"] == 0
    assert first.usage.kvtrim["held_bytes"] < first.usage.kvtrim["full_bytes"]
    turns = [
        *said(TEXT + "Who?"),
        {"role": "assistant", "content": first.choices[0].message.content},
        *said("Why?"),
    ]
    second = client.chat.completions.create(model=model_folder.name, messages=turns, **SHORT)
    assert second.usage.kvtrim["reused_tokens"] > len(TEXT)
    full = client.chat.completions.create(
        model=model_folder.name, messages=said(TEXT + "Who?"), max_tokens=2,
        extra_body={"kvtrim": {"compress": False}},
    )  # fmt: skip
    assert full.usage.kvtrim["held_bytes"] >= full.usage.kvtrim["full_bytes"] * 0.9
    chosen = client.chat.completions.create(
        model=model_folder.name, messages=said("A short one. " * 8), max_tokens=2,
        extra_body={"kvtrim": {"method": "h2o", "keep": "48", "settings": {"window": 8}}},
    )  # fmt: skip
    assert chosen.usage.kvtrim["held_bytes"] < chosen.usage.kvtrim["full_bytes"]


def test_completions_and_responses(client, model_folder):
    name = model_folder.name
    got = client.completions.create(model=name, prompt=["One", "Two"], logprobs=2, **SHORT)
    assert len(got.choices) == 2 and len(got.choices[0].logprobs.token_logprobs) == 6
    pieces = client.completions.create(model=name, prompt="One", stream=True, **SHORT)
    assert "".join(p.choices[0].text for p in pieces) == got.choices[0].text
    asked = dict(
        model=name, input="Who?", instructions="Be short.", max_output_tokens=6,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    whole = client.responses.create(**asked)
    assert whole.output_text and whole.usage.output_tokens == 6
    assert whole.status == "incomplete"
    text, last = "", None
    for event in client.responses.create(**asked, stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert text == whole.output_text and last.response.output_text == text


def test_an_answer_of_no_said_length_ends_with_the_window(client, model_folder):
    asked = dict(model=model_folder.name, messages=said("Who?"), extra_body={"ignore_eos": True})
    got = client.chat.completions.create(**asked)
    assert got.usage.total_tokens == 512 and got.choices[0].finish_reason == "length"


def test_log_probabilities_and_stops(client, model_folder):
    asked = dict(model=model_folder.name, messages=said("Who?"))
    got = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, **SHORT)
    for each in got.choices[0].logprobs.content:
        assert each.logprob == each.top_logprobs[0].logprob <= 0
    text = got.choices[0].message.content
    cut = client.chat.completions.create(**asked, stop=[text[2:4]], **SHORT).choices[0]
    assert cut.message.content == text[: text.index(text[2:4])] and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        ({"model": "gpt-9"}, "NotFoundError", "GET /v1/models"),
        ({"model": ""}, "NotFoundError", "GET /v1/models"),
        ({"model": "@nobody"}, "NotFoundError", "no document 'nobody'"),
        ({"model": "@../../etc"}, "NotFoundError", "no document"),
        ({"messages": []}, "BadRequestError", "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "BadRequestError", "role"),
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"max_tokens": 5000}, "BadRequestError", "window"),
        ({"n": 99}, "BadRequestError", "n"),
        ({"stop": ["a"] * 17}, "BadRequestError", "stop"),
        ({"extra_body": {"kvtrim": {"keep": "-3"}}}, "BadRequestError", "keep"),
        ({"extra_body": {"kvtrim": {"method": "os:system"}}}, "BadRequestError", "HTTP"),
        (
            {"extra_body": {"kvtrim": {"method": "headkv", "settings": {"table": "/etc/passwd"}}}},
            "BadRequestError",
            "names a file",
        ),
        (
            {"extra_body": {"kvtrim": {"settings": {"budget.table": "/etc/passwd"}}}},
            "BadRequestError",
            "names a file",
        ),
        (
            {"extra_body": {"kvtrim": {"settings": {"nothing": 1}, "compress": False}}},
            "BadRequestError",
            "unknown parameter",
        ),
        ({"extra_body": {"kvtrim": {"x": 1}}}, "BadRequestError", "x"),
    ],
)
def test_faults_of_clients_are_told_as_such(client, model_folder, change, kind, why):
    asked = {"model": model_folder.name, "messages": said("Who?"), "max_tokens": 2, **change}
    with pytest.raises(getattr(openai, kind), match=why):
        client.chat.completions.create(**asked)


def test_bodies_that_are_nothing_are_refused(url):
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"model": "\\ud800"}'):
        status, answer = send(url, "POST", "/v1/chat/completions", body)
        assert status == 400 and answer["error"]["message"], body
    huge = {"Content-Length": str(1 << 40)}
    assert send(url, "POST", "/v1/chat/completions", b"{}", **huge)[0] == 413
    assert send(url, "PUT", "/v1/documents/bad", b"\xff\xfe")[0] == 400
    assert send(url, "PUT", "/v1/documents/..%2Fx", b"text")[0] in (400, 404, 405)
    assert send(url, "PUT", "/v1/documents/empty", b"  ")[0] == 400
    assert send(url, "GET", "/v1/nothing")[0] == 404


def test_a_key_is_asked_of_everything_that_tells_something(url, manual):
    for path in (
        "/v1/models",
        "/v1/documents",
        "/metrics",
        "/v1/documents/manual",
        "/openapi.json",
    ):
        assert send(url, "GET", path, key=None)[0] == 401
        assert send(url, "GET", path, key=KEY[:-1])[0] == 401
    assert send(url, "POST", "/v1/chat/completions", b"{}", key="")[0] == 401
    assert send(url, "GET", "/health", key=None) == (200, {"status": "ok"})
    status, page = send(url, "GET", "/", key=None)
    assert status == 200 and "<title>kvtrim</title>" in page and "manual" not in page


def test_documents_come_and_go(url, folder, client, model_folder):
    made = {"name": "brief", "text": TEXT[:120], "method": "adakv", "keep": 40, "wait": True}
    status, document = send(url, "POST", "/v1/documents", json.dumps(made).encode())
    assert status == 200 and document["method"] == "adakv" and document["keep"] == "40"
    assert send(url, "GET", "/v1/documents/brief")[1]["tokens"] == document["tokens"]
    assert send(url, "DELETE", "/v1/documents/brief")[1]["deleted"]
    assert send(url, "GET", "/v1/documents/brief")[0] == 404
    assert "brief" not in {each["name"] for each in send(url, "GET", "/v1/documents")[1]["data"]}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{model_folder.name}@brief", messages=said("Who?"))


def test_a_client_that_leaves_frees_its_place(url, client, model_folder):
    asked = dict(model=model_folder.name, messages=said("Go on"), max_tokens=400)
    asked |= {"stream": True, "extra_body": {"ignore_eos": True}}
    for _ in range(3):
        with client.chat.completions.create(**asked) as stream:
            next(iter(stream))
    for _ in range(100):
        metrics = send(url, "GET", "/metrics")[1]
        if "kvtrim_answering 0.0" in metrics:
            break
        threading.Event().wait(0.1)
    assert "kvtrim_answering 0.0" in metrics


def test_nothing_of_a_request_is_logged(url, client, folder, model_folder):
    secret = "xyzzy-plugh-4711"
    client.chat.completions.create(model=model_folder.name, messages=said(secret), max_tokens=2)
    send(url, "PUT", "/v1/documents/hush", (secret * 4).encode())
    send(url, "GET", f"/v1/{secret}")
    metrics = send(url, "GET", "/metrics")[1]
    assert 'kvtrim_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    assert "kvtrim_tokens_total" in metrics and secret not in metrics
    log = (folder / "log").read_text().splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]
    assert any(line.get("path") == "/v1/chat/completions" for line in lines)
    assert secret not in (folder / "log").read_text() and KEY not in (folder / "log").read_text()


def test_curl_asks_and_streams(url, manual, model_folder):
    body = {"model": f"{model_folder.name}@manual", "messages": said("Who?"), "max_tokens": 3}
    body |= {"stream": True, "ignore_eos": True}
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-d", json.dumps(body)]
    command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    try:
        got = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no curl here")
    lines = [line for line in got.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_killed_and_started_again_no_document_is_lost(folder, model_folder, url, manual):
    process, second = launch(folder, model_folder)
    try:
        sent = threading.Thread(
            target=lambda: send_quietly(second, "PUT", "/v1/documents/late", TEXT.encode() * 2)
        )
        sent.start()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        sent.join()
        process, third = launch(folder, model_folder)
        names = {each["name"] for each in send(third, "GET", "/v1/documents")[1]["data"]}
        assert "manual" in names
        body = {"model": "@manual", "messages": said("Who?"), "max_tokens": 2}
        status, answer = send(third, "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert status == 200 and answer["usage"]["kvtrim"]["reused_tokens"] == manual["tokens"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def send_quietly(*given):
    try:
        send(*given)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--host", "example.org"), "--api-key"),
        (("--memory", "12"), "--memory"),
        (("--api-key", "short"), "8 characters"),
        (("--keep", "0"), "keep"),
        (("--method", "nothing"), "unknown method"),
    ],
)
def test_a_server_that_must_not_start_does_not(options, why, monkeypatch, capsys, model_folder):
    from kvtrim.cli import main

    monkeypatch.delenv("KVTRIM_API_KEY", raising=False)
    given = ["kvtrim", "serve", "--model", str(model_folder), *options]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and why in capsys.readouterr().err


def test_without_a_key_only_names_of_this_machine_are_answered(model_folder, tmp_path, local):
    """So that no page that renames its own server to this address can ask."""
    from fastapi.testclient import TestClient

    from kvtrim.serve.app import application
    from kvtrim.serve.library import Library
    from kvtrim.serve.scheduler import Limits
    from kvtrim.serve.service import Defaults, Service

    service = Service("tiny", *local, Library(tmp_path), Limits(), Defaults())
    with TestClient(application(service), base_url="http://localhost") as client:
        assert client.get("/v1/models").status_code == 200
        for host in ("evil.example", "testserver"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 403
    assert torch.is_grad_enabled() and isinstance(models.tokenizer().vocab_size, int)
