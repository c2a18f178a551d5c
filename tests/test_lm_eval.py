"""The lm-evaluation-harness adapter against the harness's own `hf` model; no network."""

import json
from functools import cache, partialmethod
from importlib.util import find_spec

import pytest
import torch

import kvtrim
from kvtrim.errors import UsageError
from late import Late
from models import tiny, tokenizer
from processes import start

harness, tasks_of, instances = Late("lm_eval"), Late("lm_eval.tasks"), Late("lm_eval.api.instance")
plain_lm, lm_eval = Late("lm_eval.models.huggingface"), Late("kvtrim.lm_eval")
missing = "lm-eval is not installed: pip install 'kvtrim[lm-eval]'"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason=missing),
]
TEXT = "The keeper of the lighthouse counted the ships that passed in the night, one by on; " * 3
TEXT = TEXT.strip()  # the harness moves blanks at the end to what follows
WINDOW = 8  # of snapkv, so that small budgets are possible


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(model):
    return plain_lm.HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1)


def ours(model, method="full", **options):
    return lm_eval.KvtrimLM(model, method, tokenizer=tokenizer(), **options)


def asked(kind, *arguments):
    return [instances.Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


@cache
def choices():
    return asked(
        "loglikelihood",
        (TEXT, " A lamp"),
        (TEXT, "B"),  # one token
        ("", "nothing before"),
        (TEXT[:50], " some words that follow"),
        (TEXT, " A lamp was lit"),
        (TEXT * 2, " beyond the window"),  # 512 tokens: cut on the left
    )


@pytest.mark.parametrize("tail", [0, 1, 7, 10_000])
def test_with_the_full_cache_log_likelihoods_are_those_of_hf(model, plain, tail):
    wanted = plain.loglikelihood(choices(), disable_tqdm=True)
    found = ours(model, tail=tail).loglikelihood(choices(), disable_tqdm=True)
    for (own, greedy), (theirs, also) in zip(found, wanted, strict=True):
        assert own == pytest.approx(theirs, abs=1e-4)
        assert greedy == also


@pytest.mark.parametrize("stride", [40, 512])
def test_with_the_full_cache_perplexities_are_those_of_hf(model, plain, stride):
    texts = asked("loglikelihood_rolling", (TEXT,), (TEXT * 3,), ("short",))
    wanted = plain.loglikelihood_rolling(texts, disable_tqdm=True)
    found = ours(model, stride=stride).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-3)


def test_with_the_full_cache_answers_are_those_of_hf(model, plain):
    how = {"until": ["~"], "max_gen_toks": 12}
    texts = asked("generate_until", (TEXT, how), (TEXT[:40], how))
    wanted = plain.generate_until(texts, disable_tqdm=True)
    assert ours(model).generate_until(texts, disable_tqdm=True) == wanted
    assert ours(model, tail=0).generate_until(texts, disable_tqdm=True) == wanted


def test_a_sampled_answer_is_that_of_hf_with_the_same_seed(model, plain):
    how = {"until": ["~"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7}
    texts = asked("generate_until", (TEXT, how))
    torch.manual_seed(3)
    wanted = plain.generate_until(texts, disable_tqdm=True)
    torch.manual_seed(3)
    assert ours(model).generate_until(texts, disable_tqdm=True) == wanted


def test_a_continuation_is_scored_after_the_compressed_context(model):
    ids, answer = tokenizer()(TEXT).input_ids, tokenizer()(" A lamp").input_ids
    with kvtrim.attach(model), torch.no_grad():
        cache = kvtrim.Cache(model, "snapkv", 40, window=WINDOW)
        model(torch.tensor([ids[:-1]]), past_key_values=cache)
        assert cache.entries()[0].max() == 40
        logits = model(torch.tensor([[ids[-1], *answer[:-1]]]), past_key_values=cache).logits[0]
    log = logits.float().log_softmax(-1)
    wanted = sum(log[n, token].item() for n, token in enumerate(answer))
    small = ours(model, "snapkv", keep=40, window=WINDOW)
    (found, _), *_ = small.loglikelihood(choices()[:1], disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_choices_share_a_cache_and_do_not_disturb_each_other(model):
    small = ours(model, "h2o", keep=40, window=WINDOW)
    together = small.loglikelihood(choices(), disable_tqdm=True)
    for one, found in zip(choices(), together, strict=True):
        alone = small.loglikelihood([one], disable_tqdm=True)[0]
        assert alone[0] == pytest.approx(found[0], abs=1e-9)


def test_one_token_choices_notice_eviction_only_if_the_tail_is_read_after_it(model, plain):
    wanted = plain.loglikelihood(choices()[1:2], disable_tqdm=True)[0][0]
    how = dict(keep=40, window=WINDOW)
    blind = ours(model, "snapkv", tail=0, **how).loglikelihood(choices()[1:2], disable_tqdm=True)
    seen = ours(model, "snapkv", tail=1, **how).loglikelihood(choices()[1:2], disable_tqdm=True)
    assert blind[0][0] == pytest.approx(wanted, abs=1e-4)
    assert abs(seen[0][0] - wanted) > 1e-3


@pytest.mark.parametrize("method", ["snapkv", "kvzip", "fastkv", "gemfilter", "pyramidinfer"])
def test_methods_of_every_kind_score_and_answer(model, method):
    small = ours(model, method, keep="50%", **({"window": WINDOW} if method == "snapkv" else {}))
    assert all(score < 0 for score, _ in small.loglikelihood(choices(), disable_tqdm=True))
    texts = asked("loglikelihood_rolling", (TEXT,))
    assert small.loglikelihood_rolling(texts, disable_tqdm=True)[0] < 0
    texts = asked("generate_until", (TEXT, {"until": ["~"], "max_gen_toks": 4}))
    assert small.generate_until(texts, disable_tqdm=True)[0]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"method": "snapvk"}, "snapkv"),
        ({"windw": 16}, "unknown argument 'windw'"),
        ({"tail": -1}, "tail=-1"),
        ({"keep": "0"}, "keeps nothing"),
        ({"parallelize": True}, "parallelize"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(model, wrong, said):
    with pytest.raises(UsageError, match=said):
        ours(model, **{"method": "snapkv", **wrong})


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a choice task, a generating task and a perplexity task of three rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    made = [
        {"question": TEXT[: 100 + 20 * n], "choices": [" one", " two", " three"], "label": n}
        for n in range(3)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    for name, kind, target, more, metric in (
        ("local_choice", "multiple_choice", "label", "doc_to_choice: choices", "acc"),
        (
            "local_words",
            "generate_until",
            '"{{choices[0]}}"',
            "generation_kwargs: {until: ['~'], max_gen_toks: 5}",
            "exact_match",
        ),
        ("local_text", "loglikelihood_rolling", '"{{question}}"', "", "word_perplexity"),
    ):
        text = TASK.format(
            name=name, kind=kind, target=target, more=more, metric=metric, rows=rows
        )
        if kind == "loglikelihood_rolling":
            text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.process
def test_the_harness_runs_local_tasks_from_the_command_line(tasks, tmp_path, monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    named = f"pretrained={tmp_path}/model,dtype=float32,method=full"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data")
    own = partialmethod(tasks_of.TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(tasks_of.TaskManager, "__init__", own)  # reading 10,000 others takes long
    found = _run(tasks, tmp_path, "--model", "kvtrim", "--model_args", named)
    hf = plain_lm.HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1)
    manager = tasks_of.TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["local_choice", "local_words", "local_text"]
    wanted = harness.simple_evaluate(
        model=hf, tasks=names, task_manager=manager, bootstrap_iters=0
    )
    for task in names:
        for metric, value in wanted["results"][task].items():
            if "," in metric and "stderr" not in metric:
                own = found["results"][task][metric]
                assert own == pytest.approx(value, rel=1e-4), (task, metric)
    assert found["config"]["kvtrim"]["method"] == "full"


def _run(tasks, out, *arguments):
    """The results that the command line wrote."""
    assert lm_eval.NAME not in lm_eval.registry  # the command makes itself known
    names = "local_choice,local_words,local_text"
    wanted = ["--tasks", names, "--include_path", tasks, "--output_path", out / "found"]
    process = start("lm-eval", *arguments, *wanted, "--device", "cpu", log=out / "log")
    process.stdout.read()
    assert process.wait() == 0, (out / "log").read_text()[-3000:]
    (path,) = (out / "found").rglob("results_*.json")
    return json.loads(path.read_text())
