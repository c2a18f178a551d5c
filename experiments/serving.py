"""What a server of documents costs and saves: first tokens, many at once, an upload, a long load.

    python experiments/serving.py [--only first,many,upload] [--out experiments/serving]
    python experiments/serving.py --only load --minutes 10

A server is started as a process, on a library of its own, and asked over HTTP as clients do.

first:  seconds to the first token of a question to a saved document (question-agnostic), to the
        same document held whole (method full), and of the question alone, in turn; beside the
        seconds of reading the document.
many:   tokens per second of one request, and of 16 that share 4 documents, compressed and whole.
upload: seconds between the tokens of four answers, before and while a document is uploaded.
load:   clients that ask, stream, leave and send what no server understands, under a memory bound
        that is too small for the documents. Every answer has to be the one that its question got
        alone; then the server is killed (SIGKILL), started again, and asked once more.

Documents are made by rule: each line says where another object is kept, and by whom.
"""

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx2 as httpx
import torch

from kvtrim.bench.provenance import provenance
from kvtrim.files import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from serve.served import KEY, launch

KEEP, REPEATS, THREADS = "25%", 7, 2
OBJECTS = "lantern compass ledger violin kettle anchor mirror saddle globe chisel".split()
PLACES = "harbour office,mill loft,chapel vault,north tower,ferry house,glass works".split(",")
PEOPLE = "Ida Brandt,Tomas Reuel,Wen Zhao,Nadia Okoro,Per Lind,Rosa Maris".split(",")
AUTH = {"Authorization": f"Bearer {KEY}"}


def document(number, lines):
    """Text of its own for every number; about 21 tokens a line."""
    rng = random.Random(number)
    return "\n".join(
        f"Entry {line}: the {rng.choice(OBJECTS)} with the mark {rng.randrange(1000, 9999)} is "
        f"kept in the {rng.choice(PLACES)} by {rng.choice(PEOPLE)}."
        for line in range(lines)
    )


def question(number):
    """A question of the same length for every number."""
    return f"Where is the object of entry {100 + number % 900} kept, and by whom?"


class Server:
    """A server process, asked over HTTP."""

    def __init__(self, folder, *options, model="smollm2"):
        self.process, self.url = launch(
            folder, model, "--method", "auto", "--keep", KEEP, "--threads", str(THREADS), *options
        )
        limits = httpx.Limits(max_connections=200)
        self.http = httpx.Client(base_url=self.url, headers=AUTH, timeout=600, limits=limits)
        self.id = self.http.get("/v1/models").json()["data"][0]["id"]

    def upload(self, name, text, **how):
        """The facts of a document that was read, and the seconds that it took."""
        start = time.perf_counter()
        answer = self.http.post(
            "/v1/documents", json={"name": name, "text": text, "wait": True, **how}
        )
        answer.raise_for_status()
        return answer.json() | {"seconds": time.perf_counter() - start}

    def ask(self, name, asked, tokens, **more):
        """A whole answer: its text, and what was read and reused."""
        answer = self.http.post(
            "/v1/chat/completions", json=self.body(name, asked, tokens, **more)
        )
        answer.raise_for_status()
        got = answer.json()
        return got["choices"][0]["message"]["content"], got["usage"]

    def times(self, name, asked, tokens, leave=None, **more):
        """When each piece of a streamed answer came, counted from the request; and the text."""
        body = self.body(name, asked, tokens, stream=True, **more)
        start, times, text = time.perf_counter(), [], ""
        with self.http.stream("POST", "/v1/chat/completions", json=body) as lines:
            lines.raise_for_status()
            for line in lines.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    times.append(time.perf_counter() - start)
                    text += piece
                    if leave is not None and len(times) >= leave:
                        break
        return times, text

    def body(self, name, asked, tokens, **more):
        """A request to a document, or to the model alone."""
        return {
            "model": self.id if name is None else f"{self.id}@{name}",
            "messages": [{"role": "user", "content": asked}],
            "max_tokens": tokens,
            **more,
        }

    def metrics(self):
        """What the server counts."""
        text = self.http.get("/metrics").text
        return {k: float(v) for k, v in re.findall(r"^(kvtrim_\w+) (\S+)$", text, re.MULTILINE)}

    def resident(self):
        """Bytes of the process in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def kill(self):
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


# Figures


def first(server, lines):
    """Seconds to the first token."""
    text = document(1, lines)
    kept, whole = server.upload("kept", text), server.upload("whole", text, method="full")
    cells = {"document, compressed": "kept", "document, whole": "whole", "question alone": None}
    found = {name: [] for name in cells}
    for number in range(REPEATS + 1):
        for name, model in cells.items():
            times, _ = server.times(model, question(number), 4, ignore_eos=True)
            if number:  # the first of each warms up
                found[name].append(times[0])
    alone = median(found["question alone"])
    return {
        "tokens": kept["tokens"],
        "method": kept["method"],
        "keep": KEEP,
        "held_bytes": kept["held_bytes"],
        "full_bytes": whole["held_bytes"],
        "reading_s": {"compressed": kept["seconds"], "whole": whole["seconds"]},
        "first_token_s": {name: median(times) for name, times in found.items()},
        "times_of_question_alone": {n: median(times) / alone for n, times in found.items()},
    }


def many(server, lines, tokens=48):
    """Tokens per second of one request, and of sixteen."""
    found = {}
    for kind in ("compressed", "whole"):
        for number in range(4):
            how = {"method": "full"} if kind == "whole" else {}
            server.upload(f"{kind}{number}", document(10 + number, lines), **how)
        server.ask(f"{kind}0", question(900), tokens, ignore_eos=True)
        single, together = [], []
        for repeat in range(3):
            start = time.perf_counter()
            server.ask(f"{kind}0", question(10 * repeat), tokens, ignore_eos=True)
            single.append(tokens / (time.perf_counter() - start))
            start = time.perf_counter()
            _at_once(
                lambda n, kind=kind, repeat=repeat: server.ask(
                    f"{kind}{n % 4}", question(100 + 20 * repeat + n), tokens, ignore_eos=True
                ),
                16,
            )
            together.append(16 * tokens / (time.perf_counter() - start))
        found[kind] = {
            "one_tokens_per_s": median(single),
            "sixteen_tokens_per_s": median(together),
            "times": median(t / s for t, s in zip(together, single, strict=True)),
        }
    return {"tokens": tokens, "documents": 4, **found}


def upload(server, lines, tokens=160):
    """Seconds between tokens of others, before and while a document is read."""
    found = {"streams": 4, "tokens": tokens}
    for kind in ("compressed", "whole"):
        found[kind] = _upload(server, lines, tokens, kind)
    return found


def _upload(server, lines, tokens, kind):
    """As `upload`, all documents compressed or all whole."""
    how = {"method": "full"} if kind == "whole" else {}
    for number in range(4):
        server.upload(f"{kind}-up{number}", document(30 + number, lines // 4), **how)
    gaps, when = [], {}
    start = time.perf_counter()

    def stream(number):
        asked = f"{kind}-up{number}", question(number), tokens
        times, _ = server.times(*asked, ignore_eos=True)
        offset = time.perf_counter() - start - times[-1]
        gaps.extend((offset + a, b - a) for a, b in pairwise(times))

    def read():
        time.sleep(2)
        when["begin"] = time.perf_counter() - start
        server.upload(f"{kind}-late", document(40, lines), **how)
        when["end"] = time.perf_counter() - start

    _at_once(lambda n: read() if n == 4 else stream(n), 5)
    before = [gap for at, gap in gaps if at < when["begin"]]
    during = [gap for at, gap in gaps if when["begin"] <= at < when["end"]]
    return {
        "upload_tokens": server.http.get(f"/v1/documents/{kind}-late").json()["tokens"],
        "upload_s": when["end"] - when["begin"],
        "gap_before_s": median(before),
        "gap_during_s": median(during),
        "times": median(during) / median(before),
        "tokens_during": len(during),
    }


# Load


def _malformed(rng, server):
    """A request that no server can answer, and what it should say."""
    good = server.body(None, "x", 4)
    bodies = [
        b"",
        b"{",
        b"[" * 5000,
        json.dumps(good)[: rng.randrange(1, 40)].encode(),
        json.dumps({**good, "messages": []}).encode(),
        json.dumps({**good, "messages": [{"role": "wizard", "content": "x"}]}).encode(),
        json.dumps({**good, "model": rng.choice(["", "nobody@nothing", "../etc", "@" * 50])}),
        json.dumps({**good, "max_tokens": rng.choice([-1, 0, 10**9, "many"])}),
        json.dumps({**good, "temperature": rng.choice([-1, 9e9, "hot"])}),
        json.dumps({**good, "n": rng.choice([0, 99])}),
        json.dumps({**good, "stop": ["", "x"] * 9}),
        json.dumps({**good, "kvtrim": {"method": rng.choice(["os:system", "nothing"])}}),
        json.dumps({**good, "kvtrim": {"settings": {"budget.table": "/etc/passwd"}}}),
        json.dumps({**good, "messages": [{"role": "user", "content": "\ud800"}]}),
        bytes(rng.randrange(256) for _ in range(200)),
    ]
    return rng.choice(["/v1/chat/completions"] * 5 + ["/v1/documents"]), rng.choice(bodies)


def load(server, folder, minutes, clients, malformed, options, model):
    """Ten minutes of everything at once; what went wrong in it."""
    documents = {f"load{n}": document(60 + n, 8 + 9 * n) for n in range(8)}
    for name, text in documents.items():
        server.upload(name, text, method="snapkv" if name < "load4" else "auto")
    asked = [(name, question(n)) for n in range(4) for name in [*documents, None]]
    alone = {key: server.ask(*key, 12)[0] for key in asked}
    if len(set(alone.values())) < len(alone) // 2:
        raise SystemExit("too many answers are alike to tell documents apart")
    bound = server.metrics()["kvtrim_memory_bytes"]
    seen = [(server.metrics()["kvtrim_held_bytes"], server.resident())]
    tally, faults, end, left = Counter(), [], time.monotonic() + 60 * minutes, [malformed]

    def client(number):
        rng = random.Random(number)
        while time.monotonic() < end:
            what = rng.random()
            try:
                if what < 0.7 and left[0] > 0:
                    left[0] -= 1
                    _send_malformed(rng)
                    time.sleep(rng.random())
                    continue
                key = rng.choice(asked)
                if what < 0.79:
                    server.times(*key, 200, leave=rng.randrange(1, 12), ignore_eos=True)
                    tally["left"] += 1
                    continue
                stream = rng.random() < 0.5
                text = server.times(*key, 12)[1] if stream else server.ask(*key, 12)[0]
                tally["answered"] += 1
                if text != alone[key]:
                    faults.append(("another answer", key, alone[key], text))
            except httpx.HTTPStatusError as error:
                tally[f"status {error.response.status_code}"] += 1
                if error.response.status_code != 429:
                    faults.append(("status", error.response.status_code, str(error)))
                time.sleep(float(error.response.headers.get("retry-after", 1)))
            except Exception as error:
                faults.append((type(error).__name__, str(error)))

    def _send_malformed(rng):
        path, body = _malformed(rng, server)
        headers = {"Content-Type": "application/json"}
        got = server.http.post(path, content=body, headers=headers)
        tally["malformed"] += 1
        if not 400 <= got.status_code < 500 or "error" not in got.json():
            faults.append(("malformed", got.status_code, path, repr(body)[:100], got.text[:200]))

    def watch():
        while time.monotonic() < end:
            try:
                metrics = server.metrics()
                seen.append((metrics["kvtrim_held_bytes"], server.resident()))
            except Exception as error:
                faults.append(("metrics", str(error)))
            time.sleep(1)

    _at_once(lambda n: watch() if n == clients else client(n), clients + 1)
    before = {each["name"] for each in server.http.get("/v1/documents").json()["data"]}
    server.kill()
    again = Server(folder, *options, model=model)
    after = {each["name"] for each in again.http.get("/v1/documents").json()["data"]}
    wrong = [key for key in asked if again.ask(*key, 12)[0] != alone[key]]
    again.kill()
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": dict(tally),
        "faults": [list(map(str, fault)) for fault in faults[:20]],
        "fault_count": len(faults),
        "memory_bound": bound,
        "most_held": max(held for held, _ in seen),
        "resident_first_last": [seen[len(seen) // 10][1], seen[-1][1]],
        "documents_lost": sorted(before - after),
        "answers_changed_by_restart": len(wrong),
    }


def _at_once(work, count):
    """Threads that each do `work(number)`; the first error of theirs is raised."""
    errors = []

    def run(number):
        try:
            work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main():
    """Measure what was asked for, and keep it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="first,many,upload")
    parser.add_argument("--lines", type=int, default=150, help="of a long document")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--malformed", type=int, default=2000)
    parser.add_argument("--memory", default="96MiB", help="the bound of the load")
    parser.add_argument("--out", type=Path, default=Path("experiments/serving"))
    given = parser.parse_args()
    record = given.out / "serving.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--memory", given.memory] if name == "load" else []
            server = Server(Path(folder), *options, model=given.model)
            try:
                if name == "load":
                    more = (given.minutes, given.clients, given.malformed, options, given.model)
                    result = load(server, Path(folder), *more)
                else:
                    measure = {"first": first, "many": many, "upload": upload}[name]
                    result = measure(server, given.lines)
            finally:
                server.kill()
        place = provenance(torch.device("cpu")) | {"model": given.model, "threads": THREADS}
        found[name] = {**result, "provenance": place}
        replace(record, (json.dumps(found, indent=1) + "\n").encode())
        print(json.dumps({k: v for k, v in found[name].items() if k != "provenance"}, indent=1))


if __name__ == "__main__":
    main()
