"""`evaluate` on tiny models: shared prefills and passes, figures, refusals, resuming."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import kvtrim
import models
from bench import questions
from kvtrim import records
from kvtrim.bench.eval import evaluate, grid, scores
from kvtrim.bench.eval.encode import Encoder
from kvtrim.cli import main
from kvtrim.errors import UsageError
from kvtrim.prompts import Frame, encode_ends, encode_text
from kvtrim.prompts.document import Document
from kvtrim.records.spec import EvalSpec
from kvtrim.tasks import TASKS, Sample
from processes import kill_once
from small import small

AWARE, AGNOSTIC = "question-aware", "question-agnostic"
METHODS = ("snapkv", "adakv", "h2o", "kvzip", "fastkv", "gemfilter")
SMALL = {"window": "8"}


class Rows:
    """No task of these tests reads data."""

    def __call__(self, name):
        raise AssertionError(name)

    def fingerprint(self, name):
        raise AssertionError(name)


@pytest.fixture(scope="module")
def subject():
    model = models.tiny("llama", dtype=torch.float32)
    return evaluate.Subject("tiny", model, models.tokenizer())


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    """The folder of a run that is measured once; a copy of it for tests that change it."""
    known = {}

    def folder(wanted, copy=None):
        at = known.setdefault(repr(wanted), tmp_path_factory.mktemp("finished") / "run")
        if not at.exists():
            run(subject, wanted, at)
        return at if copy is None else shutil.copytree(at, copy)

    return folder


OF_ANSWERS = ("answer", "new_tokens", "stopped")


def asked(*tasks, methods=METHODS, keeps=("48",), settings=SMALL, **changed):
    cells = grid.cells(methods, keeps, settings)
    return grid.Grid(tasks or (questions.WORDS_TASK,), cells, **{"limit": 2} | changed)


def run(subject, wanted, folder, **how):
    evaluate.evaluate(subject, wanted, Rows(), folder, **how)
    return lines(folder)


def lines(folder, name="samples.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same(folder):
    return {name: (folder / name).read_bytes() for name in ("inputs.jsonl", "samples.jsonl")}


@pytest.mark.parametrize(("protocol", "batch"), [(AWARE, 1), (AGNOSTIC, 1), (AGNOSTIC, 40)])
def test_one_prefill_for_all_equals_one_for_each(subject, tmp_path, protocol, batch):
    tasks = questions.WORDS_TASK, questions.PREFIXED
    wanted = asked(*tasks, protocol=protocol, batch=batch, limit=1 + (batch > 1))
    found = run(subject, wanted, tmp_path / "once")
    run(subject, wanted, tmp_path / "each", once=False)
    assert same(tmp_path / "once") == same(tmp_path / "each")
    assert len(found) == 2 * wanted.limit * 7 and all(line["outcome"] == "ok" for line in found)


@pytest.mark.parametrize("protocol", [AWARE, AGNOSTIC])
def test_answers_generated_together_are_those_generated_alone(
    subject, finished, tmp_path, protocol
):
    alone = lines(finished(asked(protocol=protocol)))
    together = run(subject, asked(protocol=protocol, batch=64), tmp_path / "together")
    for one in alone:
        key = {name: one[name] for name in ("sample", "method", "keep")}
        (other,) = [line for line in together if key.items() <= line.items()]
        for name in ("answer", "new_tokens", "stopped", "held_bytes", "entries"):
            assert other[name] == one[name]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["kl"] == (None if one["kl"] is None else pytest.approx(one["kl"], abs=1e-5))


@pytest.mark.parametrize("protocol", [AWARE, AGNOSTIC])
@pytest.mark.parametrize("method", ["full", "snapkv", "gemfilter", "h2o"])
def test_answers_are_those_of_generate(subject, tmp_path, protocol, method):
    """The same prompt through `kvtrim.generate`: a blank line is all that differs, so none is."""
    task = replace(questions.WORDS_TASK, chat=True)
    own = small(method)
    wanted = asked(task, methods=[method], keeps=["48"], settings=own, protocol=protocol, limit=1)
    sample = next(iter(task.samples(subject.encoder(None).request(Rows(), 1))))
    sample = replace(sample, document=sample.document.strip()[0])  # where a context ends
    apart = replace(sample, question="\n\n" + sample.question)
    spaced = replace(task, samples=lambda request: [apart])
    line = run(subject, replace(wanted, tasks=(spaced,)), tmp_path / "run")[-1]
    result = kvtrim.generate(
        subject.model, subject.tokenizer, sample.document, sample.question, method=method,
        keep=48, max_new_tokens=6, protocol=protocol, **own,
    )  # fmt: skip
    assert line["prompt_tokens"] == result.prompt_tokens
    assert line["answer"].strip() == result.text


@pytest.fixture
def surer(subject):
    """With logits that are far apart, so that the divergence has a direction."""
    head, weight = subject.model.lm_head, subject.model.lm_head.weight
    head.weight = torch.nn.Parameter(40 * weight.detach())
    yield
    head.weight = weight


@pytest.mark.usefixtures("surer")
def test_loss_and_divergence_are_those_of_a_pass_over_the_answer(subject, tmp_path):
    for protocol, skip in ((AGNOSTIC, 0), (AWARE, 1)):
        wanted = asked(methods=["snapkv"], keeps=["48"], protocol=protocol, limit=1)
        full, cut = run(subject, wanted, tmp_path / protocol)
        encoder = subject.encoder(None)
        sample = next(iter(questions.samples(encoder.request(Rows(), 1))))
        given = encoder.encode(questions.WORDS_TASK, sample)
        log = {}
        for method in ("full", "snapkv"):
            own = {"window": 8} if method == "snapkv" else {}
            first, spans, lead = given.read_first(protocol == AWARE)
            cache = kvtrim.Cache(subject.model, method, 48, spans=spans, **own)
            with torch.no_grad(), kvtrim.attach(subject.model):
                logits = subject.model(torch.tensor([first]), past_key_values=cache).logits[:, -1:]
                for token in [*lead, *given.gold[:-1]]:
                    out = subject.model(torch.tensor([[token]]), past_key_values=cache).logits
                    logits = torch.cat([logits, out], dim=1)
            log[method] = logits[0, len(lead) :].double().log_softmax(-1)[skip:]
        gold = torch.tensor(given.gold[skip:])
        for line, method in ((full, "full"), (cut, "snapkv")):
            loss = -log[method].gather(1, gold[:, None]).mean()
            assert line["loss"] == pytest.approx(float(loss), rel=1e-4)
        kl = (log["full"].exp() * (log["full"] - log["snapkv"])).sum(-1).mean()
        assert cut["kl"] == pytest.approx(float(kl), rel=1e-3) and full["kl"] is None


def test_auto_goes_by_the_protocol(subject, tmp_path):
    for protocol, becomes in ((AGNOSTIC, "kvzip:refit=values+bias"), (AWARE, "adakv")):
        wanted = asked(methods=["auto", becomes], settings={}, protocol=protocol, limit=1)
        _, auto, own = run(subject, wanted, tmp_path / protocol)
        names = ("loss", "kl", "held_bytes", "answer")
        assert auto["method"] == "auto" and [auto[n] for n in names] == [own[n] for n in names]


def test_protocols_measure_the_budget_at_their_own_moment(subject, tmp_path):
    for protocol in (AWARE, AGNOSTIC):
        wanted = asked(methods=["snapkv"], keeps=["48"], protocol=protocol)
        for full, cut in zip(*[iter(run(subject, wanted, tmp_path / protocol))] * 2, strict=True):
            given = [x for x in lines(tmp_path / protocol, "inputs.jsonl")]
            own = next(x for x in given if x["sample"] == cut["sample"])
            assert cut["entries"] == 48 and cut["full_bytes"] == full["full_bytes"]
            read = own["context_tokens"] + (own["question_tokens"] if protocol == AWARE else 0)
            assert full["entries"] == read and cut["protocol"] == protocol
            assert cut["prompt_tokens"] == own["context_tokens"] + own["question_tokens"]


def test_nothing_stands_between_document_question_and_prefix(subject):
    encoder = subject.encoder(None)
    sample = next(iter(questions.PREFIXED.samples(encoder.request(Rows(), 1))))
    given = encoder.encode(questions.PREFIXED, sample)
    text = f"<s><user>{sample.document.text}{sample.question}<assistant>The word is"
    assert subject.tokenizer.decode(given.ids) == text
    assert given.gold == encode_text(subject.tokenizer, " " + sample.answers[0])[:4]
    plain = encoder.encode(questions.CODE, sample)
    assert subject.tokenizer.decode(plain.ids).startswith(sample.document.text[:9])


def test_blanks_before_a_question_are_the_tokens_of_the_whole_prompt():
    tokenizer = models.tokenizer(chat=False, lines=True)
    assert len(encode_text(tokenizer, "\n\n")) == 1
    encoder = Encoder(tokenizer, 512)
    for text in ("one two\n\n", "one two", "one two \n"):
        sample = Sample("0", Document(text), "Q: three", ("four",))
        given = encoder.encode(questions.CODE, sample)
        assert given.ids == tokenizer(text + "Q: three").input_ids
        assert tokenizer.decode(given.context).endswith("two")


def test_a_prompt_that_is_too_long_loses_its_middle(subject, tmp_path):
    found = run(subject, asked(questions.LONG, methods=["snapkv"], limit=2), tmp_path / "window")
    assert [one["truncated"] for one in lines(tmp_path / "window", "inputs.jsonl")] == [True] * 2
    assert {line["prompt_tokens"] for line in found} == {512 - 6}
    shorter = asked(questions.LONG, methods=["snapkv"], limit=2, length=200)
    found = run(subject, shorter, tmp_path / "length")
    assert {line["prompt_tokens"] for line in found} == {200 - 6}


def test_samples_that_would_be_cut_can_be_left_out(subject, tmp_path):
    every = asked(methods=["snapkv"], limit=4)
    run(subject, every, tmp_path / "all")
    sizes = {
        line["sample"]: line["context_tokens"] + line["question_tokens"] + 6
        for line in lines(tmp_path / "all", "inputs.jsonl")
    }
    length = sorted(sizes.values())[1]
    fitting = asked(methods=["snapkv"], limit=4, length=length, fitting=True)
    run(subject, fitting, tmp_path / "fitting")
    left = lines(tmp_path / "fitting", "inputs.jsonl")
    assert {line["sample"] for line in left} == {s for s, size in sizes.items() if size <= length}
    assert 2 <= len(left) < 4 and not any(line["truncated"] for line in left)


def test_a_prompt_made_to_its_length_is_not_cut_to_it():
    encoder = Encoder(models.tokenizer(), 512, 100)
    sample = next(iter(questions.LONG.samples(encoder.request(Rows(), 1))))
    made = replace(sample, group={"length": 100})
    assert len(encoder.encode(questions.LONG, sample).ids) == 100 - 6
    assert len(encoder.encode(questions.LONG, made).ids) == 512 - 6


@pytest.mark.parametrize("bound", [100, 101, 160])
def test_the_middle_of_a_prompt_is_cut_as_longbench_cuts_it(bound):
    tokenizer = models.tokenizer()
    task = replace(questions.LONG, chat=False, max_new_tokens=6)
    sample = next(iter(task.samples(Encoder(tokenizer, 4096).request(Rows(), 1))))
    sample = replace(sample, prefix="")
    whole = Encoder(tokenizer, 4096).encode(task, sample)
    found = Encoder(tokenizer, 4096, truncate_at=bound).encode(task, sample)
    before = len(encode_text(tokenizer, whole.frame.before))
    bare = whole.ids[before:]  # the prompt alone, as that code has it behind the start token
    half, special = bound // 2, len(tokenizer("").input_ids)
    assert found.truncated and not whole.truncated
    assert found.ids[before:] == bare[: half - special] + bare[len(bare) - half :]
    long = Encoder(tokenizer, 4096, truncate_at=len(bare) + special)
    assert not long.encode(task, sample).truncated


def test_a_question_that_such_a_cut_would_reach_is_refused():
    encoder = Encoder(models.tokenizer(), 512, truncate_at=16)
    sample = next(iter(questions.LONG.samples(encoder.request(Rows(), 1))))
    given = encoder.encode(questions.LONG, replace(sample, question="why? " * 20))
    assert "ask for --truncate-at" in given.problem


def test_template_and_longer_answers_are_those_asked_for():
    spec = EvalSpec(chat=True, max_new_tokens=99)
    found = grid.Grid.of(["gsm8k-8", "longbench-qasper"], ["snapkv"], ["48"], {}, spec)
    assert [(task.chat, task.max_new_tokens) for task in found.tasks] == [(True, 256), (True, 128)]
    assert [found.answer_tokens(task) for task in found.tasks] == [99, 99]
    longer = grid.Grid.of(["gsm8k-8"], ["snapkv"], ["48"], {}, EvalSpec(max_new_tokens=300))
    assert longer.answer_tokens(longer.tasks[0]) == longer.tasks[0].max_new_tokens == 300
    record = longer.record()["tasks"]["gsm8k-8"]
    assert (
        record["chat"] is False
        and record["shots"] == "the first 8 of the eight of Wei et al. 2022"
    )


def test_a_question_longer_than_the_window_is_refused_and_the_run_goes_on(subject, tmp_path):
    def samples(request):
        first, second = questions.samples(request)
        return [replace(first, question="why? " * 200), second]

    task = replace(questions.WORDS_TASK, samples=samples)
    found = run(subject, asked(task, methods=["snapkv"], keeps=["48"]), tmp_path / "run")
    assert [line["outcome"] for line in found] == ["refused"] * 2 + ["ok"] * 2
    assert "longer window" in found[0]["reason"]
    found = run(subject, asked(task, methods=["snapkv"], length=100), tmp_path / "length")
    assert "of --length 100 for the context; use a model with a longer" in found[0]["reason"]


@pytest.mark.parametrize("others", [(), (questions.PREFIXED,)])
def test_a_task_without_samples_is_named(subject, tmp_path, others):
    wanted = asked(questions.LONG, *others, methods=["snapkv"], fitting=True)
    evaluate.evaluate(subject, wanted, Rows(), tmp_path / "run")
    scores.derive(tmp_path / "run", wanted.tasks)
    (line,) = json.loads((tmp_path / "run" / "eval.json").read_text())["without_samples"]
    assert line.startswith("long: no samples: --fitting left out all of them")
    assert line in (tmp_path / "run" / "eval.md").read_text()


@pytest.mark.parametrize("wide", [True, False])
def test_the_bound_that_is_too_narrow_is_named(wide):
    encoder = Encoder(models.tokenizer(), 512 if wide else 64, 60 if wide else None)
    sample = next(iter(questions.samples(encoder.request(Rows(), 1))))
    given = encoder.encode(questions.WORDS_TASK, replace(sample, question="why? " * 12))
    bound = "--length 60" if wide else "the model's window of 64"
    assert f"of {bound} for the context" in given.problem
    if not wide:
        assert "use a model with a longer window" in given.problem
        return
    least = int(re.search(r"ask for --length (\d+) or more", given.problem)[1])
    longer = replace(sample, question="why? " * 12, document=kvtrim.Document("elm " * 90))
    short = replace(encoder, length=least - 1).encode(questions.WORDS_TASK, longer)
    assert f"ask for --length {least} or more" in short.problem
    enough = replace(encoder, length=least).encode(questions.WORDS_TASK, longer)
    assert enough.problem == "" and len(enough.ids) + 6 == least


def test_where_the_template_alone_fills_the_window_nothing_is_left_of_the_document():
    tokenizer = models.tokenizer()
    around = Frame("word " * 30, "", "")
    with pytest.raises(UsageError, match="leave 0 tokens for the context; shorten"):
        encode_ends(tokenizer, around, "elm " * 50, 20)
    prompt = len(encode_text(tokenizer, around.before))
    assert len(encode_ends(tokenizer, around, "elm " * 50, prompt + 1)) == prompt + 1


@pytest.mark.parametrize("name", ["niah-words", "ruler-niah-single-1", "ruler-fwe"])
def test_prompts_that_are_made_fit_into_the_window_with_the_template(name):
    for window in (1000, 1023):
        tokenizer = models.tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "<user>" + "user " * 9)
        encoder = Encoder(tokenizer, window)
        task = TASKS[name]
        for sample in task.samples(encoder.request(Rows(), 2, 0, task.chat)):
            given = encoder.encode(task, sample)
            assert not given.truncated and not given.problem


def test_a_length_above_the_window_is_refused_before_anything(subject, tmp_path):
    with pytest.raises(UsageError, match="--length 513 is more than the window of tiny, 512"):
        run(subject, asked(methods=["snapkv"], length=513), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_made_samples_are_the_same_whether_or_not_they_have_to_fit(subject):
    def ids(fitting):
        wanted = grid.Grid((TASKS["niah-words"],), grid.cells(["snapkv"], ["48"]), limit=5)
        found = evaluate.units(subject, replace(wanted, fitting=fitting), Rows())
        return [sample.id for _, unit in found for sample in unit]

    assert ids(True) == ids(False) and len(ids(True)) == 5
    assert [one.split("/")[1] for one in ids(True)] == ["0", "22", "44", "78", "100"]


def test_an_empty_question_and_an_empty_document_can_be_measured(subject, tmp_path):
    def samples(request):
        first, second = questions.samples(request)
        nothing = kvtrim.Document("")
        return [replace(first, question=""), replace(second, document=nothing)]

    task = replace(questions.WORDS_TASK, samples=samples, chat=False)
    for protocol in (AWARE, AGNOSTIC):
        wanted = asked(task, methods=["snapkv"], keeps=["48"], protocol=protocol)
        found = run(subject, wanted, tmp_path / protocol)
        assert all(line["outcome"] == "ok" for line in found)


def test_a_method_that_cannot_serve_is_refused_and_the_run_goes_on(subject, tmp_path):
    wanted = asked(methods=["pyramidinfer", "snapkv"], keeps=["48"], batch=8)
    found = run(subject, wanted, tmp_path / "run")
    by = {line["method"]: line for line in found}
    assert by["pyramidinfer"]["outcome"] == "refused" and by["snapkv:window=8"]["outcome"] == "ok"
    assert "out of reach" in by["pyramidinfer"]["reason"]
    assert by["pyramidinfer"]["loss"] is None and by["pyramidinfer"]["held_bytes"] is None
    rows = scores.derive(tmp_path / "run", wanted.tasks)
    row = next(row for row in rows if row["method"] == "pyramidinfer")
    assert (row["n"], row["failed"], row["score"]) == (0, 2, None)
    (line,) = json.loads((tmp_path / "run" / "eval.json").read_text())["refused"]
    assert "2 refused: keep=48 is out of reach" in line


@pytest.mark.parametrize("batch", [1, 8])
def test_too_little_memory_for_one_costs_that_one_alone(subject, tmp_path, monkeypatch, batch):
    from kvtrim.bench.eval import decode

    fed = decode._feed

    def hungry(model, cache, ids, keep):
        if ids.shape[0] > 1 or cache.held_bytes > 40_000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return fed(model, cache, ids, keep)

    monkeypatch.setattr(decode, "_feed", hungry)
    wanted = asked(methods=["snapkv"], keeps=["48"], protocol=AWARE, batch=batch)
    found = run(subject, wanted, tmp_path / "run")
    assert [line["outcome"] for line in found] == ["oom", "ok"] * 2
    assert "80 GiB" in found[0]["reason"] and found[1]["kl"] is None


def test_without_memory_to_record_every_method_reads_for_itself(
    subject, finished, tmp_path, monkeypatch
):
    from kvtrim.bench.eval import prefill

    wanted = asked(methods=["snapkv", "adakv"], keeps=["48"])
    once = finished(wanted)

    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prefill, "record", none)
    run(subject, wanted, tmp_path / "each")
    assert same(once) == same(tmp_path / "each")


def test_answers_can_be_bounded_and_nothing_else_changes(subject, finished, tmp_path):
    whole = lines(finished(asked(methods=["snapkv"])))
    found = run(subject, asked(methods=["snapkv"], max_new_tokens=2), tmp_path / "short")
    longer = run(subject, asked(methods=["snapkv"], max_new_tokens=99), tmp_path / "longer")
    assert longer == whole and max(line["new_tokens"] for line in whole) > 2
    for short, line in zip(found, whole, strict=True):
        assert short["new_tokens"] <= 2 and line["answer"].startswith(short["answer"])
        assert {**short, **{name: line[name] for name in OF_ANSWERS}} == line
    with pytest.raises(UsageError, match="max_new_tokens"):
        run(subject, asked(methods=["snapkv"]), tmp_path / "short")
    scores.derive(tmp_path / "short", asked().tasks)
    assert "Answers of at most 2 tokens" in (tmp_path / "short" / "eval.md").read_text()


def test_an_answer_ends_before_a_stop_string(subject, finished, tmp_path):
    plain = lines(finished(asked(methods=["snapkv"], limit=1)))
    text = plain[0]["answer"]
    assert len(text) > 3 and plain[0]["stopped"] == "length"
    task = replace(questions.WORDS_TASK, stop=("nowhere", text[2:4]))
    found = run(subject, asked(task, methods=["snapkv"], limit=1, batch=8), tmp_path / "stopped")
    assert found[0]["answer"] == text[: text.index(text[2:4])]
    assert found[0]["stopped"] == "stop" and found[0]["new_tokens"] < plain[0]["new_tokens"]


def test_an_answer_ends_at_an_end_token_but_not_before_its_least_length(
    subject, finished, tmp_path
):
    wanted = asked(methods=["snapkv"], limit=1)
    plain = lines(finished(wanted))
    first = encode_text(subject.tokenizer, plain[0]["answer"])[0]
    before, subject.model.generation_config.eos_token_id = 2, [2, first]
    try:
        ended = run(subject, wanted, tmp_path / "ended")
        task = replace(questions.WORDS_TASK, min_new_tokens=1)
        longer = run(subject, replace(wanted, tasks=(task,)), tmp_path / "longer")
    finally:
        subject.model.generation_config.eos_token_id = before
    assert (ended[0]["new_tokens"], ended[0]["stopped"]) == (1, "eos")
    assert longer[0]["new_tokens"] > 1


def test_an_answer_has_its_least_length_where_no_token_ends_one(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(type(subject.tokenizer), "eos_token_id", None, raising=False)
    task = replace(questions.WORDS_TASK, min_new_tokens=1)
    found = run(subject, asked(task, methods=["snapkv"], limit=1), tmp_path / "run")
    assert {line["stopped"] for line in found} == {"length"}


def test_no_stop_string_comes_before_the_least_length(subject, tmp_path):
    wanted = asked(methods=["snapkv"], limit=2, keeps=["48"], batch=8)
    plain = run(subject, wanted, tmp_path / "plain")
    firsts = tuple({encode_text(subject.tokenizer, line["answer"])[0] for line in plain})
    stop = tuple(subject.tokenizer.decode([token]) for token in firsts)
    task = replace(questions.WORDS_TASK, stop=stop)
    ended = run(subject, replace(wanted, tasks=(task,)), tmp_path / "ended")
    assert {line["answer"] for line in ended} == {""}
    task = replace(task, min_new_tokens=1)
    longer = run(subject, replace(wanted, tasks=(task,)), tmp_path / "longer")
    assert all(line["answer"] for line in longer)


def test_the_record_is_there_before_the_first_sample(subject, tmp_path):
    seen = []

    def samples(request):
        seen.append((tmp_path / "run" / "run.json").exists())
        yield from questions.samples(request)

    task = replace(questions.WORDS_TASK, samples=samples)
    run(subject, asked(task, methods=["snapkv"], seed=7, batch=4), tmp_path / "run")
    assert seen == [True]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["kind"] == "eval" and record["seed"] == 7 and record["decoding"] == "greedy"
    assert record["model"]["name"] == "tiny" and record["model"]["dtype"] == "float32"
    assert record["tasks"]["words"]["version"] == 1 and record["batch"] == 4
    full, snapkv = record["methods"]
    assert (full["method"], full["name"], full["keep"], full["settings"]) == (
        "full",
        "full",
        "",
        {},
    )
    assert (snapkv["method"], snapkv["name"]) == ("snapkv:window=8", "snapkv")
    assert (
        snapkv["parameters"]["policy"] == "SnapKV" and snapkv["parameters"]["policy.window"] == 8
    )
    assert record["machine"]["packages"]["torch"] and record["machine"]["code"]


def test_another_run_in_the_folder_is_refused(subject, finished, tmp_path):
    finished(asked(methods=["snapkv"]), tmp_path / "run")
    before = same(tmp_path / "run")
    for changed in ({"seed": 1}, {"limit": 3}, {"protocol": AGNOSTIC}, {"batch": 2}):
        with pytest.raises(UsageError, match="holds another run"):
            run(subject, asked(methods=["snapkv"], **changed), tmp_path / "run")
    newer = replace(questions.WORDS_TASK, version=2)
    with pytest.raises(UsageError, match=r"tasks.words.version: 1 there, 2 here"):
        run(subject, asked(newer, methods=["snapkv"]), tmp_path / "run")
    assert same(tmp_path / "run") == before


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(
    subject, finished, tmp_path, batch, stop_at
):
    wanted = asked(questions.WORDS_TASK, questions.PREFIXED, methods=["snapkv"], batch=batch)
    count = 0

    def killed(*_):
        nonlocal count
        count += 1
        if count > stop_at + 1:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(subject, wanted, folder, progress=killed)
    if (folder / "samples.jsonl").exists():
        for name, dropped in (("samples.jsonl", 30), ("inputs.jsonl", 0)):
            os.truncate(folder / name, max(0, (folder / name).stat().st_size - dropped))
        with (folder / "inputs.jsonl").open("a") as file:
            file.write('{"task": "wor')  # what a power cut leaves
    run(subject, wanted, folder)
    assert same(folder) == same(finished(wanted))
    assert len(lines(folder, "times.jsonl")) == len(lines(folder))


def test_lines_of_other_samples_are_not_taken_for_ones_own(subject, finished, tmp_path):
    wanted = asked(methods=["snapkv"])
    finished(wanted, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    path.write_text(path.read_text().replace('"sample": "w0"', '"sample": "w9"'))
    with pytest.raises(UsageError, match="holds other samples"):
        run(subject, wanted, tmp_path / "run")


@pytest.mark.parametrize("changed", [{"question": "\nWhich?"}, {"answers": ("elm",)}])
def test_a_task_that_has_changed_is_not_gone_on_with(subject, finished, tmp_path, changed):
    finished(asked(methods=["snapkv"]), tmp_path / "run")
    before = same(tmp_path / "run")

    def samples(request):
        return (replace(one, **changed) for one in questions.samples(request))

    newer = replace(questions.WORDS_TASK, samples=samples)
    with pytest.raises(UsageError, match="sample w0 of task words is not what"):
        run(subject, asked(newer, methods=["snapkv"]), tmp_path / "run")
    assert same(tmp_path / "run") == before


@pytest.mark.process
def test_a_killed_process_leaves_a_run_that_goes_on(model_folder, tmp_path, monkeypatch, capsys):
    command = [
        "eval", "--model", str(model_folder), "--task",
        "bench.questions:WORDS_TASK", "--method", "snapkv", "--method", "h2o", "--keep", "48",
        "--set", "window=8", "--protocol", AGNOSTIC, "--limit", "12", "--threads", "1", "--json",
    ]  # fmt: skip
    journal = tmp_path / "run" / "samples.jsonl"

    def six():
        return journal.exists() and journal.read_bytes().count(b"\n") > 5

    kill_once(six, "not six samples", *command, "--out", "run", folder=tmp_path)
    killed_at = journal.read_bytes().count(b"\n")
    assert 5 < killed_at < 36
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "whole"):
        monkeypatch.setattr(sys, "argv", ["kvtrim", *command, "--out", folder])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert same(tmp_path / "run") == same(tmp_path / "whole")
    for name in ("scores.jsonl", "eval.md"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_code_is_not_run_unless_allowed(subject, tmp_path):
    ran = []

    def score(answer, sample):
        ran.append(answer)
        return 1.0

    wanted = asked(replace(questions.CODE, score=score), methods=["snapkv"], keeps=["48"])
    run(subject, wanted, tmp_path / "run")
    rows = scores.derive(tmp_path / "run", wanted.tasks)
    assert not ran and all(
        row["score"] is None and row["n"] == 2 for row in rows if not row["group"]
    )
    found = lines(tmp_path / "run", "scores.jsonl")
    assert {line["outcome"] for line in found} == {records.NEEDS_PERMISSION}
    rows = scores.derive(tmp_path / "run", wanted.tasks, allow_code_execution=True)
    assert len(ran) == 4 and rows[0]["score"] == 1


def test_scores_are_derived_and_grouped(subject, tmp_path):
    def score(answer, sample):
        return sample.extra["asked"] / 100

    wanted = asked(replace(questions.WORDS_TASK, score=score), methods=["snapkv"], limit=6)
    run(subject, wanted, tmp_path / "run")
    rows = scores.derive(tmp_path / "run", wanted.tasks)
    given = {one["sample"]: one for one in lines(tmp_path / "run", "inputs.jsonl")}
    worth = [one["extra"]["asked"] / 100 for one in given.values()]
    assert rows[0]["method"] == "full" and rows[0]["group"] == {} and rows[0]["n"] == 6
    assert rows[0]["score"] == pytest.approx(sum(worth) / 6)
    assert rows[0]["score_interval"][0] <= rows[0]["score"] <= rows[0]["score_interval"][1]
    halves = [row for row in rows if row["group"] == {"half": "first"} and row["method"] == "full"]
    some = [
        one["extra"]["asked"] / 100 for one in given.values() if one["group"]["half"] == "first"
    ]
    assert halves[0]["score"] == pytest.approx(sum(some) / len(some))
    for name in ("scores.jsonl", "eval.json", "eval.md"):
        before = (tmp_path / "run" / name).read_bytes()
        scores.derive(tmp_path / "run", wanted.tasks)
        assert (tmp_path / "run" / name).read_bytes() == before
    with pytest.raises(UsageError, match="no task 'words'"):
        scores.derive(tmp_path / "run", [questions.LONG])


def test_sliding_layers_are_measured_one_by_one(tmp_path):
    own = evaluate.Subject("gemma", models.tiny("gemma3_text").float(), models.tokenizer())
    wanted = asked(methods=["snapkv", "h2o"], keeps=["48"], batch=8)
    found = run(own, wanted, tmp_path / "run")
    assert all(line["outcome"] == "ok" for line in found)
