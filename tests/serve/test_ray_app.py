"""Replicas on a Ray cluster: documents go where they are held, and a killed replica loses none."""

import json
import os
import re
import signal
import threading
import time
import urllib.request
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from served import KEY, launch, send

from kvtrim.errors import UsageError
from kvtrim.serve.limits import Defaults, Limits

if not (find_spec("ray") and find_spec("grpc")):  # not loaded here: this process is forked
    pytest.skip(
        "Ray Serve is not installed: pip install 'kvtrim[replicas]'", allow_module_level=True
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
TEXT = "Chapter 1. " + "The cat sat on the mat and looked at the sea. " * 4
CHAT = "/v1/chat/completions"
ENTRY = 384  # bytes of one token
MEMORY = 2800 * ENTRY
REPORTED_S = 2.5  # until what replicas hold is known to whoever routes
WAIT_S = 240  # a bound, for machines that do other things as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def served(folder, model_folder):
    """The address of a front and its two replicas."""
    source = Path(__file__).parents[2] / "src"
    paths = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    quick = {"PYTHONPATH": paths, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    more = ["--replicas", 2, "--threads", 1, "--batch", 16, "--memory", f"{MEMORY}B"]
    # fresh: a fork after Ray would wait for ever, and Ray sends no functions that are checked
    process, url = launch(folder, model_folder, *more, fresh=True, **quick)
    loaded = Path(f"/proc/{process.pid}/maps")
    assert not loaded.exists() or "tokenizers" not in loaded.read_text()  # nor transformers
    yield url
    left = [number for number in processes(folder).values() if is_there(number)]
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    process.wait(40)
    until(lambda: not any(map(is_there, left)), "a replica outlived its front")


def lines(folder):
    """What the front logged."""
    log = (folder / "log").read_text().splitlines()
    return [json.loads(line) for line in log if line.startswith("{")]


def takers(folder, path, count):
    """Which replicas took the requests to a path, once so many were logged."""

    def found():
        taken = [line["replica"] for line in lines(folder) if line.get("path") == path]
        return (taken,) if len(taken) >= count else None

    return until(found, f"{path} was not logged")[0]


def ask(url, name, text="Who?", new=4, **more):
    body = {"model": f"@{name}", "messages": [{"role": "user", "content": text}]}
    body |= {"max_tokens": new, "ignore_eos": True, **more}
    return send(url, "POST", CHAT, json.dumps(body).encode())


def begin(url, timeout=WAIT_S, **asked):
    """An answer under way."""
    body = {"messages": [{"role": "user", "content": "Go on"}], "ignore_eos": True, **asked}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    sent = urllib.request.Request(url + CHAT, json.dumps(body).encode(), headers)
    return urllib.request.urlopen(sent, timeout=timeout)


def said(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def gauge(url, name):
    """What every replica counts, by its name."""
    page = send(url, "GET", "/metrics")[1]
    return {r: float(n) for r, n in re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)', page, re.M)}


def until(condition, what):
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def processes(folder):
    """The process numbers of the replicas that were started first, by name."""
    return {line["replica"]: line["process"] for line in lines(folder) if "process" in line}


def is_there(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.process
def test_documents_go_where_they_are_held_and_outlive_a_replica(served, folder):
    url = served
    holders = {}
    while len(set(holders.values())) < 2:  # the one that holds less is given the next
        name = f"d{len(holders)}"
        assert name != "d8", "all documents are held by one replica"
        made = send(url, "PUT", f"/v1/documents/{name}", f"{TEXT} {name}".encode())[1]
        assert made["status"] == "ready"
        holders[name] = takers(folder, "/v1/documents/{name}", len(holders) + 1)[-1]

    # to the replica that holds it, and to no other
    alone = {}
    for turn in range(3):
        for name in holders:
            answer = ask(url, name, f"Who {turn}?", new=40)
            alone[name, turn] = said(answer)
            assert answer[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > len(TEXT)
    assert takers(folder, CHAT, len(alone)) == list(holders.values()) * 3
    counts = {name: float(list(holders.values()).count(name)) for name in holders.values()}
    assert gauge(url, "kvtrim_documents") == counts

    # killed while it answers
    got = {}

    def load(name, turn):
        got[name, turn] = ask(url, name, f"Who {turn}?", new=40)

    stream = begin(url, model="@d0", stream=True, max_tokens=200)
    assert stream.readline().startswith(b"data: ")
    threads = [threading.Thread(target=load, args=key) for key in alone]
    for thread in threads:
        thread.start()
    until(lambda: gauge(url, "kvtrim_answering").get(holders["d0"], 0) > 2, "nothing is answered")
    os.kill(processes(folder)[holders["d0"]], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert {key: said(answer) for key, answer in got.items()} == alone
    page = send(url, "GET", "/metrics")[1]
    assert float(re.search(r"^kvtrim_front_again_total (\S+)", page, re.M)[1]) > 0
    *_, last = stream.read().strip().split(b"\n\n")  # it had begun
    assert b"server_error" in last or last == b"data: [DONE]"

    # by the other, from the library; then there are two again
    assert said(ask(url, "d0", "Who 0?", new=40)) == alone["d0", 0]
    until(lambda: send(url, "GET", "/health")[1].get("replicas") == 2, "it was not replaced")
    listed = send(url, "GET", "/v1/documents")[1]["data"]
    assert {each["name"] for each in listed} == set(holders)


@pytest.mark.process
def test_a_client_that_leaves_frees_its_place_behind_the_front(served, model_folder):
    asked = {"model": model_folder.name, "max_tokens": 400}
    with begin(served, stream=True, **asked) as answer:
        assert answer.readline()
    until(lambda: not any(gauge(served, "kvtrim_answering").values()), "it goes on")
    with pytest.raises(TimeoutError):
        begin(served, timeout=0.3, **asked)
    until(lambda: not any(gauge(served, "kvtrim_answering").values()), "it goes on")


@pytest.mark.process
def test_documents_are_listed_read_and_removed_whoever_has_them(served):
    made = {"name": "brief", "text": TEXT, "wait": False}
    assert send(served, "POST", "/v1/documents", json.dumps(made).encode())[0] == 202
    path = "/v1/documents/brief"
    until(lambda: send(served, "GET", path)[1]["status"] == "ready", "it is not read")
    assert "<html" in send(served, "GET", f"{path}/kept")[1]
    assert send(served, "DELETE", path)[1]["deleted"]
    assert send(served, "GET", path)[0] == 404
    assert ask(served, "brief")[0] == 404
    assert send(served, "PUT", path, b"  ")[0] == 400
    assert send(served, "GET", "/v1/nothing")[0] == 404


@pytest.mark.process
def test_a_replica_that_let_go_of_a_document_is_no_longer_asked_for_it(served, folder):
    url = served
    for each in send(url, "GET", "/v1/documents")[1]["data"]:
        assert send(url, "DELETE", f"/v1/documents/{each['name']}")[1]["deleted"]
    until(lambda: not any(gauge(url, "kvtrim_documents").values()), "removed, and still held")
    time.sleep(REPORTED_S)

    def taker(path, action):
        """Which replica takes what an action asks."""
        before = len(takers(folder, path, 0))
        answer = action()
        return takers(folder, path, before + 1)[-1], answer

    holders = {}
    for name in ("e0", "e1", "e2"):  # the one that holds less is given the next
        path = f"/v1/documents/{name}"
        action = partial(send, url, "PUT", path, f"A short text for {name}. It ends.".encode())
        holders[name], made = taker("/v1/documents/{name}", action)
        assert made[1]["status"] == "ready"
    one, two = sorted(set(holders.values()), key=lambda each: list(holders.values()).count(each))
    last, first = (name for name in reversed(holders) if holders[name] == two)
    (other,) = (name for name in holders if holders[name] == one)
    chosen, answer = taker(CHAT, partial(ask, url, first))
    assert chosen == two and said(answer)
    chosen, answer = taker(CHAT, partial(ask, url, last))
    assert chosen == two
    used, made = answer[1]["usage"], send(url, "GET", f"/v1/documents/{last}")[1]

    # room for eight long answers about one is room for no other document
    assert send(url, "DELETE", f"/v1/documents/{other}")[1]["deleted"]
    time.sleep(REPORTED_S)
    question = used["prompt_tokens"] - made["tokens"]
    new = ((MEMORY - made["held_bytes"]) // ENTRY - 2 * question) // 8
    asked = {"model": f"@{last}", "messages": [{"role": "user", "content": "Who?"}]}
    with begin(url, **asked, n=8, max_tokens=new, stream=True) as stream:
        assert stream.readline()
    assert gauge(url, "kvtrim_documents") == {one: 0, two: 1}
    time.sleep(REPORTED_S)
    for _ in range(2):
        assert taker(CHAT, partial(ask, url, first))[0] == one
    assert taker(CHAT, partial(ask, url, last))[0] == two


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"count": 0}, "ask for 1 or more"),
        ({"count": 2, "address": "ray://host:10001"}, "--ray-address auto"),
    ],
)
def test_what_cannot_be_is_refused_at_once(asked, why):
    from kvtrim.serve import ray_app

    setup = ray_app.Setup(Path("library"), Limits(), Defaults(), "model")
    with pytest.raises(UsageError, match=why):
        ray_app.Cluster(setup, **asked)


def test_replicas_need_room():
    from kvtrim.serve import ray_app

    setup = ray_app.Setup(Path("library"), Limits(), Defaults(), "model", threads=2)
    machines = [{"Resources": {"CPU": 4.0}}, {"Resources": {"CPU": 1.0}}]
    assert ray_app._room(machines, setup, 2) == {"num_cpus": 2.0}
    with pytest.raises(UsageError, match="room for 2 of 3 replicas"):
        ray_app._room(machines, setup, 3)
    machines = [{"Resources": {"CPU": 4.0, "GPU": 1.0}}]
    assert ray_app._room(machines, setup, 1)["num_gpus"] == 1
