"""`kvtrim recommend`: what it measures, which budget it names, and mistakes in files."""

import json
import sys

import pytest
import torch

import kvtrim
from kvtrim.bench import recommend
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.recommend import Asked, Plan
from kvtrim.cli import main
from kvtrim.errors import UsageError
from kvtrim.methods.settings import find
from models import tiny, tokenizer

TEXT = "The keeper of the lighthouse counted ships that passed in the night, one by one. "
PROMPTS = [Asked(TEXT, "How many?"), Asked(TEXT * 2, "Who counted?"), Asked(TEXT[:60])]
PROTOCOLS = ("question-agnostic", "question-aware")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def cell(method, keep, **settings):
    return Candidate(method, keep, settings)


def lines_of(model, aware, *cells, new_tokens=6):
    plan = Plan(cells, aware, new_tokens)
    given = recommend.encode(model, tokenizer(), plan, PROMPTS)
    return recommend.measure(model, tokenizer(), plan, given), given


def oracle(model, prompt, cell, aware, new_tokens):
    """Divergence and agreement by plain generation, one token at a time, without any replay."""
    ids = prompt.ids
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == model.generation_config.eos_token_id:
                break
    answer, true = ids[len(prompt) :], model(torch.tensor([ids])).logits[0]
    split = len(prompt) if aware else len(prompt.context)
    with kvtrim.attach(model), torch.no_grad():
        cache = kvtrim.Cache(model, cell.method, cell.keep, prompt_tokens=split, **cell.settings)
        model(torch.tensor([ids[:split]]), past_key_values=cache)
        cache.expect(len(prompt))
        own = model(torch.tensor([ids[split:-1]]), past_key_values=cache).logits[0]
    first = len(prompt) - 1 + aware  # the token before the first that is judged
    true = true[first:-1].float().log_softmax(-1)
    own = own[first - split :].float().log_softmax(-1)
    assert len(true) == len(own) == len(answer) - aware
    kl = (true.exp() * (true - own)).sum(-1).mean().detach()
    return float(kl), float((true.argmax(-1) == own.argmax(-1)).float().mean()), len(answer)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(
    "chosen", [cell("snapkv", "40", window=8), cell("fastkv", "50%", window=8)], ids=str
)
def test_divergence_and_agreement_are_those_of_plain_generation(model, aware, chosen):
    lines, given = lines_of(model, aware, chosen)
    for line, prompt in zip(lines, given, strict=True):
        kl, agreement, tokens = oracle(model, prompt, chosen, aware, 6)
        assert line["kl"] == pytest.approx(kl, abs=1e-5)
        assert (line["agreement"], line["tokens"]) == (pytest.approx(agreement), tokens)
        assert line["held_bytes"] < line["full_bytes"]


@pytest.mark.parametrize("aware", [False, True])
def test_a_budget_as_long_as_the_prompt_is_the_full_cache(model, aware):
    lines, _ = lines_of(model, aware, cell("snapkv", "100%"), cell("fastkv", "100%"))
    assert all(line["kl"] == pytest.approx(0, abs=1e-6) for line in lines)
    assert all(line["agreement"] == 1 for line in lines)


def test_the_figures_are_the_same_every_time(model):
    cells = cell("snapkv", "40", window=8), cell("h2o", "30%")
    first, second = (lines_of(model, False, *cells)[0] for _ in range(2))
    seconds = ("evict_s", "prefill_s")
    for one, other in zip(first, second, strict=True):
        assert {k: v for k, v in one.items() if k not in seconds} == {
            k: v for k, v in other.items() if k not in seconds
        }


def test_the_seconds_of_every_budget_have_its_observations_in_them(model, monkeypatch):
    policy, made = type(find("h2o").policy), []
    observe = policy.observe
    monkeypatch.setattr(policy, "observe", lambda *own: made.append(1) or observe(*own))
    lines_of(model, False, cell("h2o", "30%"))
    alone = len(made)
    lines_of(model, False, *(cell("h2o", keep) for keep in ("30%", "40%", "50%")))
    assert alone > 0 and len(made) == 4 * alone


def test_a_budget_that_a_method_cannot_meet_is_a_row_with_a_reason(model):
    lines, _ = lines_of(model, False, cell("snapkv", "8"), cell("knorm", "40"))
    refused, good = recommend.rows(lines, tolerance=100.0)
    assert (refused["outcome"], refused["within"]) == ("refused", False)
    assert "window" in refused["reason"] and good["within"]
    assert recommend.smallest([refused, good]) == {"snapkv": None, "knorm": good}


def test_numbers_that_overflow_are_named():
    broken = tiny("llama")
    broken.lm_head.weight.data[9] = torch.inf
    lines, _ = lines_of(broken, False, cell("knorm", "40"))
    assert {line["outcome"] for line in lines} == {"refused"}
    with pytest.raises(UsageError, match="overflow in this format; use --dtype float32"):
        recommend.rows(lines, tolerance=1.0)


def row(method, keep, held, kl, within):
    return {"method": method, "keep": keep, "held_bytes": held, "kl": kl, "within": within}


def test_the_best_holds_the_fewest_bytes_of_those_within_tolerance():
    rows = [
        row("a", "10%", 10, 0.9, False),
        row("a", "50%", 50, 0.01, True),
        row("b", "25%", 25, 0.04, True),
        row("b", "50%", 50, 0.001, True),
        row("c", "25%", 25, 0.03, True),
    ]
    assert recommend.best(rows) is rows[4]  # as small as b's and nearer to the full cache
    assert {m: r and r["keep"] for m, r in recommend.smallest(rows).items()} == {
        "a": "50%",
        "b": "25%",
        "c": "25%",
    }
    assert recommend.best(rows[:1]) is None


def test_rows_are_means_over_the_prompts_with_an_interval():
    good = {"method": "a", "keep": "1", "outcome": "ok", "reason": "", "held_bytes": 4}
    good |= {"full_bytes": 8, "entries": 1.0, "evict_s": 0.5}
    lines = [good | {"kl": kl, "agreement": kl} for kl in (0.0, 0.2, 0.4)]
    (found,) = recommend.rows([*lines, good | {"kl": None, "agreement": None}], 0.21)
    assert found["kl"] == pytest.approx(0.2) and found["prompts"] == 3 and found["within"]
    low, high = found["kl_interval"]
    assert 0 <= low < 0.2 < high <= 0.4 + 1e-9 and found["evict_s"] == 0.5
    (found,) = recommend.rows(lines[1:], 0.21)
    assert not found["within"]


def test_answers_of_one_token_say_nothing_under_question_aware(model):
    lines, _ = lines_of(model, True, cell("knorm", "40"), new_tokens=1)
    with pytest.raises(UsageError, match="question-agnostic"):
        recommend.rows(lines, 0.05)
    lines, _ = lines_of(model, False, cell("knorm", "40"), new_tokens=1)
    assert recommend.rows(lines, 0.05)[0]["prompts"] == 3


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"context": "C", "question": "Q", "answer": "x"}, {"prompt": "P"}, "plain"]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert recommend.read(path) == [Asked("C", "Q"), Asked("P"), Asked("plain")]
    path = tmp_path / "prompts.txt"
    path.write_text("one\\nline\n\nanother\n")
    assert recommend.read(path) == [Asked("one\nline"), Asked("another")]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "empty"),
        ('"a"\n{"context": ', ":2: this is not JSON"),
        ('{"text": "a"}', ':1: expected {"context"'),
        ('{"context": "a", "question": 3}', ":1: expected"),
        ("[1]", ":1: expected an object or a text"),
        ('{"prompt": "  "}', ":1: expected"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"prompts\.jsonl") as refused:
        recommend.read(path)
    assert said in str(refused.value)


def test_a_prompt_that_is_too_long_is_refused_or_cut(model):
    long = [Asked(TEXT * 8, "How many?")]
    with pytest.raises(UsageError, match=r"prompt 1: the prompt has .* window"):
        recommend.encode(model, tokenizer(), Plan([]), long)
    (cut,) = recommend.encode(model, tokenizer(), Plan([], truncate="middle"), long)
    assert len(cut) == 512 - 32


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model_folder):
    monkeypatch.chdir(tmp_path)
    rows = [{"context": one.context, "question": one.question} for one in PROMPTS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments):
        own = ["kvtrim", "recommend", "--model", str(model_folder), *arguments]
        monkeypatch.setattr(sys, "argv", own)
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call


ASK = ("--prompts", "p.jsonl", "--method", "knorm", "--method", "streaming-llm", "--keep", "30%")
ASK += ("--keep", "90%", "--max-new-tokens", "4")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_names_the_smallest_budgets_and_the_best_method(run, protocol):
    code, out, err = run(*ASK, "--tolerance", "1000", "--protocol", protocol)
    assert (code, err) == (0, "")
    assert "knorm: keep 30%" in out and "best: --method" in out and protocol in out
    code, out, _ = run(*ASK, "--tolerance", "1000", "--protocol", protocol, "--json")
    found = json.loads(out)
    assert code == 0 and found["smallest"] == {"knorm": "30%", "streaming-llm": "30%"}
    assert found["best"]["keep"] == "30%" and len(found["rows"]) == 4
    assert found["machine"]["packages"]["torch"] and found["prompts"]["count"] == 3


def test_the_command_says_so_if_none_is_near_enough(run):
    code, out, _ = run(*ASK, "--tolerance", "0")
    assert code == 0 and "knorm: no budget within tolerance" in out
    assert "none is within 0 nats per token" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "--prompts FILE"),
        (("--prompts", "missing.jsonl"), "cannot read missing.jsonl"),
        ((*ASK[:2], "--method", "snapvk"), "snapkv"),
        ((*ASK[:2], "--method", "full"), "nothing to compare"),
        ((*ASK[:2], "--protocol", "both"), "question-agnostic"),
        ((*ASK[:2], "--keep", "lots"), "no budget"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(run, arguments, said):
    code, _, err = run(*arguments)
    assert code == 2 and said in err.replace("is not a budget", "no budget")
