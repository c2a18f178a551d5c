"""Requests that decode together get what each would get alone, within the memory they may have."""

import queue
import threading
import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kvtrim
import models
from kvtrim.hf.pack import Pack
from kvtrim.hf.seats import Seats
from kvtrim.methods.request import Request as Settled
from kvtrim.prompts import conversation
from kvtrim.serve import documents
from kvtrim.serve.documents import How
from kvtrim.serve.library import Library
from kvtrim.serve.memory import Document, Memory
from kvtrim.serve.request import Done, Failed, Refused, Request, Sampling, Token, Upload
from kvtrim.serve.scheduler import Limits, Scheduler

TEXTS = {
    f"d{n}": f"Chapter {n}. " + "The cat sat on the mat and looked. " * (3 + n) for n in range(4)
}
HOWS = {
    "d0": How(Settled.of("snapkv", "32", {"window": 8})),
    "d1": How(Settled.of("adakv", "48", {"window": 8})),
    "d2": How(Settled.of("kvzip", "50%")),
    "d3": How(Settled.of("h2o", "40", {"window": 8})),  # goes on evicting
}


@pytest.fixture(scope="module")
def model():
    model = models.tiny("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture
def served(model, tmp_path):
    made = []

    def serve(own=model, **limits):
        prints = documents.Prints.of("tiny", own, models.tokenizer())
        library = Library(tmp_path / "library")
        scheduler = Scheduler(own, models.tokenizer(), prints, library, Limits(**limits))
        made.append(scheduler)
        scheduler.start()
        return Client(scheduler)

    yield serve
    for scheduler in made:
        assert scheduler.drain(20.0)
        assert scheduler.memory.reserved == 0
        assert not any(each.users for each in scheduler.memory.documents.values())


class Client:
    def __init__(self, scheduler):
        self.scheduler = scheduler

    def ask(self, text, name=None, how=None, head="", more=(), **sampling):
        """A queue of events; one for every answer if there are `more`, by their seeds."""
        events, tokenizer = queue.Queue(), self.scheduler.reader.tokenizer
        document = None if name is None else self.scheduler.reader.library.get(name)
        said = [{"role": "user", "content": text}]
        if head:
            said = [
                {"role": "user", "content": head},
                {"role": "assistant", "content": "ok"},
                *said,
            ]
        found = conversation.encode(tokenizer, said, after_document=name is not None)
        settings = Sampling(**{"max_tokens": 8, "ignore_eos": True, **sampling})
        given = document, found.head, how
        events.request = first = Request(found.rest, settings, events.put, *given)
        others = [queue.Queue() for _ in more]
        for each, seed in zip(others, more, strict=True):
            own = replace(settings, seed=seed)
            each.request = Request(found.rest, own, each.put, *given)
            first.more.append(each.request)
        self.scheduler.submit(first)
        return [events, *others] if more else events

    def upload(self, name, text=None, how=None):
        events = queue.Queue()
        self.scheduler.submit(
            Upload(name, text or TEXTS[name], how or HOWS.get(name, HOWS["d0"]), events.put)
        )
        return events


def talk(*texts):
    """Messages of the user, "ok" between them."""
    turns = [turn for text in texts for turn in (("user", text), ("assistant", "ok"))]
    return [{"role": role, "content": text} for role, text in turns[:-1]]


def got(events):
    """(token ids, text, usage or error) of an answer."""
    ids, text = [], ""
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Failed):
            return ids, text, event.error
        if isinstance(event, Done):
            return ids, text, event.usage
        ids, text = [*ids, event.id], text + event.text


def expected(model, name, question, new=8):
    asked = HOWS[name].request
    cache = kvtrim.compress(model, models.tokenizer(), TEXTS[name], method=asked)
    done = kvtrim.generate(
        model, models.tokenizer(), cache, question, max_new_tokens=new, eos_token_id=None
    )
    return done.answers[0]


def test_a_batch_of_sixteen_answers_as_each_alone_and_as_generate(served, model):
    client = served()
    for name in TEXTS:
        entry = client.upload(name).get(timeout=60)
        assert entry.name == name and entry.tokens > 100
    questions = [(name, f"Who {n}{'?' * n}") for n in range(4) for name in TEXTS]
    together = [got(each) for each in [client.ask(text, name) for name, text in questions]]
    for (name, text), (ids, shown, usage) in zip(questions, together, strict=True):
        alone = expected(model, name, text)
        assert ids == alone.token_ids, (name, text)
        assert shown.strip() == alone.text
        assert usage.reused_tokens >= client.scheduler.reader.library.get(name).tokens
        assert usage.prompt_tokens == alone.prompt_tokens
        assert got(client.ask(text, name))[0] == ids


def test_sixteen_in_seats_answer_as_each_alone(served, model, monkeypatch):
    steps, step = [], Seats.step

    def counted(self, feeds):
        steps.append((len(feeds), self.empty_bytes > 0))
        return step(self, feeds)

    monkeypatch.setattr(Seats, "step", counted)
    client = served()
    client.scheduler._pack.gives_seats = True  # as on CUDA
    names = [name for name in TEXTS if name != "d3"]
    for name in names:
        client.upload(name).get(timeout=60)
    questions = [(name, f"Who {n}{'?' * n}", 12 + 4 * n) for n in range(5) for name in names]
    questions.append(("d0", "Why?", 40))
    asked = [client.ask(text, name, max_tokens=new) for name, text, new in questions]
    for (name, text, new), events in zip(questions, asked, strict=True):
        assert got(events)[0] == expected(model, name, text, new).token_ids
    assert len(steps) > 10 and max(count for count, _ in steps) > 8
    assert any(empty for _, empty in steps)  # some had left
    assert client.scheduler._pack.empty_bytes == 0


def test_empty_seats_count_as_held_and_are_the_first_to_go(model):
    pack = Pack(model)
    memory = Memory(100, pack)
    memory.reserved = 30
    pack._seats = SimpleNamespace(empty_bytes=60, vacate=lambda: None)
    assert memory.held_bytes == 90
    assert memory.make_room(10) and pack.has_seats
    assert memory.make_room(70) and not pack.has_seats
    assert memory.held_bytes == 30 and not memory.make_room(71)


def test_a_removed_document_counts_as_held_while_somebody_uses_it(model):
    memory = Memory(100)
    document = Document("key", kvtrim.Cache(model, "full"), 10, 80, 90, users=1)
    memory.add(document)
    memory.forget("key")
    assert memory.held_bytes == 80 and not memory.make_room(21) and memory.make_room(20)
    document.users = 0
    assert memory.held_bytes == 0 and memory.make_room(100)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "cohere2"])
def test_models_some_layers_of_which_slide_answer_as_each_alone(served, architecture):
    model = models.tiny(architecture, dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    client = served(model)
    for name in TEXTS:
        assert not isinstance(client.upload(name).get(timeout=60), Failed)
    plain = kvtrim.Cache(model, "full", 1.0)
    questions = [(name, f"Who {n}{'?' * 9 * n}", 18) for n in range(2) for name in TEXTS]
    together = [got(each) for each in [client.ask(q, d, max_tokens=m) for d, q, m in questions]]
    for (name, text, new), (ids, *_) in zip(questions, together, strict=True):
        assert ids == expected(model, name, text, new).token_ids
    for name in TEXTS:  # a conversation that goes on, answers to one prompt
        answers = client.ask("Who 0", name, max_tokens=18, more=(None,))
        assert [got(each)[0] for each in answers] == [together[[*TEXTS].index(name)][0]] * 2
    long = "A long first message. " * 4
    ids, _, usage = got(client.ask("Who?", head=long, max_tokens=24))
    entry, tokens = 2 * 2 * 8 * 4, usage.prompt_tokens + 23  # bytes of a token in one layer
    assert usage.full_bytes == entry * (2 * tokens + models.WINDOW - 1)
    assert got(client.ask("Who?", head=long, max_tokens=24))[0] == ids
    alone = served(model)
    assert got(alone.ask("Who?", head=long, max_tokens=24))[0] == ids
    said = conversation.encode(models.tokenizer(), talk(long, "Who?"), after_document=False)
    with kvtrim.attach(model), torch.no_grad():
        whole = torch.tensor([said.head + said.rest])
        written = model.generate(
            whole, past_key_values=plain, max_new_tokens=24, eos_token_id=None, do_sample=False
        )
    assert written[0, whole.shape[1] :].tolist() == ids


def test_documents_are_shared_and_conversations_resumed(served, model):
    client = served()
    client.upload("d0").get(timeout=60)
    ids, *_ = got(client.ask("Who?", "d0"))
    held = client.scheduler.memory.documents
    assert len(held) == 1
    again, _, more = got(client.ask("Who?", "d0"))
    assert again == ids and more.reused_tokens == more.prompt_tokens - 1
    short, _, first = got(client.ask("a" * 40))
    same, _, second = got(client.ask("a" * 40))
    assert same == short and first.reused_tokens == 0 and second.reused_tokens > 40
    other, _, third = got(client.ask("a" * 30 + "b"))
    assert 30 < third.reused_tokens < 45
    fresh = served()
    assert got(fresh.ask("a" * 30 + "b"))[0] == other


def test_long_first_messages_are_compressed_once(served, model):
    client, how = served(), How(Settled.of("adakv", "48", {"window": 8}))
    ids, _, usage = got(client.ask("And?", head=TEXTS["d3"], how=how))
    assert usage.reused_tokens == 0 and usage.held_bytes < usage.full_bytes
    _, _, more = got(client.ask("Why?", head=TEXTS["d3"], how=how))
    assert more.reused_tokens > 100
    cache = kvtrim.Cache(model, "adakv", 48, window=8)
    found = conversation.encode(models.tokenizer(), talk(TEXTS["d3"], "And?"))
    with kvtrim.attach(model), torch.no_grad():
        model(torch.tensor([found.head]), past_key_values=cache)
        both = torch.tensor([found.head + found.rest])
        out = model.generate(
            both,
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert out[0, both.shape[1] :].tolist() == ids


def test_two_who_bring_the_same_first_message_wait_for_one_reading(served):
    client, how = served(), How(Settled.of("snapkv", "32", {"window": 8}))
    both = [client.ask("And?", head=TEXTS["d3"], how=how) for _ in range(3)]
    reused = sorted(got(each)[2].reused_tokens for each in both)
    assert reused[0] == 0 and reused[1] > 100
    assert len(client.scheduler.memory.documents) == 1


def test_an_upload_does_not_stop_who_is_answering(served, monkeypatch):
    client = served()
    slow = client.ask("Who?", max_tokens=60)
    assert isinstance(slow.get(timeout=30), Token)
    client.scheduler.pace.rate, client.scheduler.pace.step_s = 16.0, 0.01  # chunks of 16
    done = client.upload("d2")
    ids, _, usage = got(slow)
    assert len(ids) == 59
    entry = done.get(timeout=30)
    assert not isinstance(entry, Failed), entry.error
    assert entry.name == "d2"
    assert isinstance(usage.seconds, float)


def test_sampling_depends_on_the_seed_alone(served):
    client = served()
    how = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "max_tokens": 12}
    alone = got(client.ask("Who?", **how))[0]
    many = [client.ask(f"Why {n}?", temperature=2.0) for n in range(5)]
    assert got(client.ask("Who?", **how))[0] == alone
    assert got(client.ask("Who?", **{**how, "seed": 6}))[0] != alone
    assert all(isinstance(got(each)[2].seconds, float) for each in many)


@pytest.mark.parametrize("name", [None, "d0", "d3"])
@pytest.mark.parametrize("head", ["", "A long first message. " * 6])
def test_answers_to_one_prompt_read_it_once(served, monkeypatch, name, head):
    client = served()
    if name is not None:
        client.upload(name).get(timeout=60)
    fed, feed = [], client.scheduler._pack.feed

    def count(model, feeds):
        fed.extend(len(each.ids) for each in feeds)
        return feed(model, feeds)

    monkeypatch.setattr(client.scheduler._pack, "feed", count)
    how = HOWS["d0"] if head and name is None else None
    alone = [
        got(client.ask("Who?", name, how, head, temperature=1.5, seed=seed))[0] for seed in (5, 6)
    ]
    greedy = got(client.ask("Who?", name, how, head))
    fed.clear()
    asked = dict(temperature=1.5, seed=5, more=(6, 5))
    answers = [got(each) for each in client.ask("Whom?", name, how, head, **asked)]
    read = sum(fed) - 3 * 7  # the last token of an answer is never fed
    usages = [usage for *_, usage in answers]
    assert sum(u.prompt_tokens - u.reused_tokens for u in usages) == read < 60 + len(head)
    assert [u.reused_tokens for u in usages[1:]] == [usages[0].prompt_tokens] * 2
    assert len({u.prompt_tokens for u in usages}) == 1
    answers = client.ask("Who?", name, how, head, **asked)
    assert [got(each)[0] for each in answers] == [*alone, alone[0]] and alone[0] != alone[1]
    answers = client.ask("Who?", name, how, head, more=(None,) * 3)
    assert [got(each)[:2] for each in answers] == [greedy[:2]] * 4


def test_many_answers_keep_to_places_and_memory(served):
    client = served(batch=4)
    scheduler, seen = client.scheduler, []
    asked = [client.ask(f"Who {n}?", more=(1, 2), temperature=1.0, seed=0) for n in range(3)]
    while not all(each.qsize() > 8 for answers in asked for each in answers):
        seen.append(len(scheduler.answers))
        time.sleep(0.001)
    assert max(seen) <= 4
    texts = [[got(each)[0] for each in answers] for answers in asked]
    assert all(len({tuple(ids) for ids in answers}) == 3 for answers in texts)
    wide = served(batch=2)  # more answers than places: alone then
    assert len([got(each)[0] for each in wide.ask("Who?", more=(1, 2))]) == 3
    entry = 2 * 3 * 2 * 8 * 4  # bytes of a token
    first, *others = client.ask("Who is it? " * 9, more=(1, 2), max_tokens=100)
    for each in (first, *others):
        each.get(timeout=30)
    prompt = 2 * len(first.request.ids)  # once more, since the first answer's may be stacked
    reserved = (prompt + 3 * 100) * entry
    assert scheduler.memory.reserved == reserved
    first.request.gone.set()
    while len(scheduler.answers) == 3:
        time.sleep(0.001)
    assert scheduler.memory.reserved == reserved  # its entries are read by the others
    assert all(len(got(each)[0]) == 99 for each in others)


def test_stops_lengths_and_log_probabilities(served, model):
    client = served()
    ids, text, _ = got(client.ask("Who?", max_tokens=20))
    cut = next(text[n : n + 2] for n in range(2, 20) if text[n : n + 2].isprintable())
    events = client.ask("Who?", max_tokens=20, stop=(cut,))
    shown, reason = "", None
    while reason is None:
        event = events.get(timeout=30)
        shown, reason = (
            (shown, event.reason) if isinstance(event, Done) else (shown + event.text, None)
        )
    assert shown == text[: text.index(cut)] and reason == "stop"
    event = client.ask("Who?", logprobs=3).get(timeout=30)
    assert event.id == event.top[0][0] and event.logprob == event.top[0][1] < 0
    assert len(event.top) == 3
    model.generation_config.eos_token_id = ids[4]
    try:
        assert len(got(served().ask("Who?", ignore_eos=False))[0]) <= 5
    finally:
        model.generation_config.eos_token_id = 2


def test_who_goes_away_or_comes_late_frees_the_place(served):
    client = served(batch=1)
    first, second = client.ask("Who?", max_tokens=300), client.ask("Why?")
    first.get(timeout=30)
    first.request.gone.set()
    assert len(got(second)[0]) == 8
    slow = client.ask("Who?", max_tokens=300)
    slow.get(timeout=30)
    slow.request.deadline = time.monotonic()
    error = got(slow)[2]
    assert isinstance(error, Refused) and error.status == 504


def test_the_queue_is_bounded(served):
    client = served(batch=1, queue=2)
    first = client.ask("Who?", max_tokens=300)
    first.get(timeout=30)
    waiting = [client.ask("Why?") for _ in range(2)]
    with pytest.raises(Refused, match="try again later") as refused:
        client.ask("Why?")
    assert refused.value.status == 429 and refused.value.retry_s >= 1
    first.request.gone.set()
    assert all(len(got(each)[0]) == 8 for each in waiting)


def test_memory_stays_within_its_bound(served, model):
    entry = 2 * 3 * 2 * 8 * 4  # bytes of a token
    client = served(memory=1200 * entry)
    scheduler, seen, stop = client.scheduler, [], threading.Event()
    for name in TEXTS:
        assert client.upload(name).get(timeout=60).name == name

    def watch():
        while not stop.is_set():
            seen.append(scheduler.memory.held_bytes)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    names = [name for name in TEXTS for _ in range(3)]
    answers = [got(each) for each in [client.ask("Who?", name) for name in names]]
    stop.set()
    thread.join()
    wanted = {name: expected(model, name, "Who?").token_ids for name in TEXTS}
    assert [ids for ids, *_ in answers] == [wanted[name] for name in names]
    assert max(seen) <= 1200 * entry
    error = got(client.ask("Who?", max_tokens=1300))[2]
    assert isinstance(error, Refused) and error.status == 413 and "--memory" in str(error)
    assert got(client.ask("Who?", "d0"))[0] == wanted["d0"]


def test_what_fails_fails_alone(served, monkeypatch):
    client = served()
    bad = client.upload("bad", "   ").get(timeout=30)
    assert isinstance(bad, Failed) and "empty" in str(bad.error)
    long = client.upload("long", "x" * 600).get(timeout=30)
    assert isinstance(long, Failed) and "window" in str(long.error)
    with monkeypatch.context() as patched:
        patched.setattr(client.scheduler._pack, "feed", None)
        assert isinstance(got(client.ask("Who?"))[2], TypeError)
    assert len(got(client.ask("Who?"))[0]) == 8
    with monkeypatch.context() as patched:
        patched.setattr(client.scheduler, "_admit", None)
        assert isinstance(got(client.ask("Who?"))[2], TypeError)
    assert len(got(client.ask("Who?"))[0]) == 8


def test_a_closing_server_finishes_and_takes_nothing_on(served):
    client = served()
    running = client.ask("Who?", max_tokens=40)
    thread = threading.Thread(target=client.scheduler.drain, args=(30.0,))
    thread.start()
    while client.scheduler.alive:
        time.sleep(0.001)
    with pytest.raises(Refused, match="closing"):
        client.ask("Why?")
    assert len(got(running)[0]) == 40
    thread.join()


def test_a_document_that_was_removed_is_not_held(served):
    client = served()
    entry = client.upload("d0").get(timeout=30)
    got(client.ask("Who?", "d0"))
    client.scheduler.reader.library.remove("d0")
    client.scheduler.forget(entry.key)
    got(client.ask("Who?"))
    assert entry.key not in client.scheduler.memory.documents


def test_the_queue_is_counted_while_it_changes(model, tmp_path):
    prints = documents.Prints.of("tiny", model, models.tokenizer())
    library = Library(tmp_path / "library")
    scheduler = Scheduler(model, models.tokenizer(), prints, library, Limits(queue=5))

    class Reading:
        @property
        def waiting(self):  # as if the scheduler's thread went on
            if len(scheduler.readings) < 4:
                scheduler.readings.append(Reading())
            return deque([Request([1], Sampling(1), print)])

    scheduler.readings += [Reading(), Reading()]
    scheduler.submit(Request([1], Sampling(1), print))
    with pytest.raises(Refused, match="5 requests wait"):
        scheduler.submit(Request([1], Sampling(1), print))


def test_repetition_is_penalised_as_generate_does(served):
    own = models.tiny("llama", dtype=torch.float32)
    own.generation_config.eos_token_id, own.generation_config.repetition_penalty = 2, 4.0
    client = served(own)
    client.upload("d0").get(timeout=60)
    plain = got(client.ask("Who?", "d0", max_tokens=16))[0]
    assert plain == expected(own, "d0", "Who?", new=16).token_ids
    own.generation_config.repetition_penalty = 1.0
    assert plain != expected(own, "d0", "Who?", new=16).token_ids
