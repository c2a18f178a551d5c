"""Full-cache scores of `kvtrim eval` and of lm-evaluation-harness, on the same model and rows.

    python experiments/agreement.py --data DIR [--mmlu 60] [--gsm8k 24] [--out DIR]

The harness runs its own `hf` model, its own generation and its own filters and metrics (those of
mmlu_generative and gsm8k_cot, 0.4.13) on the prompts that kvtrim's tasks make, handed over as a
local data set; kvtrim reads, generates and scores for itself. Question-aware is the protocol of
the harness: the whole prompt is read at once.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import kvtrim
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.eval.evaluate import Subject, evaluate
from kvtrim.bench.eval.grid import Grid
from kvtrim.bench.eval.scores import derive
from kvtrim.bench.provenance import provenance
from kvtrim.tasks import find_tasks
from kvtrim.tasks.rows import reader

LETTER = """
filter_list:
  - name: get_response
    filter:
      - {function: regex, regex_pattern: '^(.*?)(?=\\n|$)'}
      - {function: remove_whitespace}
      - {function: regex, regex_pattern: '^(.*?)\\s*$'}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true,
     ignore_case: true}
generation_kwargs: {do_sample: false, until: ['</s>', "\\n"]}
"""
NUMBER = """
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: 'The answer is (\\-?[0-9\\.\\,]+).'}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,
     ignore_punctuation: false, regexes_to_ignore: [',', '\\$', '(?s).*#### ', '\\.$']}
generation_kwargs: {do_sample: false, until: ['Q:', '</s>', '<|im_end|>']}
"""


def ours(
    subject: Subject, task: str, limit: int, data: Path, out: Path
) -> tuple[float, dict[str, str]]:
    """Mean score of `kvtrim eval` for the full cache, and the answer to every prompt."""
    tasks = tuple(find_tasks([task]))
    evaluate(
        subject, Grid(tasks, (Candidate("full"),), "question-aware", limit), reader(data), out
    )
    derive(out, tasks)
    scores, lines = (read(out / name) for name in ("scores.jsonl", "samples.jsonl"))
    mean = sum(line["score"] for line in scores) / len(scores)
    return mean, {line["sample"]: line["answer"] for line in lines}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def theirs(
    subject: Subject, task: str, limit: int, data: Path, config: str, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The harness's scores on the same prompts, and its answers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chosen = find_tasks([task])[0]
    request = subject.encoder(None).request(reader(data), limit, 0)
    lines = []
    for sample in list(chosen.samples(request))[:limit]:
        target = sample.extra.get("final", sample.answers[0].strip())
        prompt = sample.document.text + sample.question
        line = {"sample": sample.id, "prompt": prompt, "target": str(target)}
        lines.append(json.dumps(line))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    head = {"task": "same", "dataset_path": "json", "test_split": "test"}
    head |= {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    head |= {"output_type": "generate_until", "doc_to_text": "{{prompt}}"}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    (folder / "same.yaml").write_text(f'{text}\ndoc_to_target: "{{{{target}}}}"\n{config}')
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    model._max_gen_toks = chosen.max_new_tokens
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["same"], task_manager=manager, bootstrap_iters=0)
    scores = found["results"]["same"].items()
    answers = {one["doc"]["sample"]: one["resps"][0][0] for one in found["samples"]["same"]}
    return {name: value for name, value in scores if name.startswith("exact_match,")}, answers


def main() -> None:
    """Run both sides and write agreement.json and agreement.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mmlu", type=int, default=60)
    parser.add_argument("--gsm8k", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("experiments/agreement"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    subject, found = Subject("smollm2", model, tokenizer), []
    wanted = (("mmlu-5", given.mmlu, LETTER), ("gsm8k-8", given.gsm8k, NUMBER))
    for task, limit, config in wanted:
        with tempfile.TemporaryDirectory() as folder:
            mean, answers = ours(subject, task, limit, given.data, Path(folder) / "run")
            harness, others = theirs(subject, task, limit, given.data, config, Path(folder))
        same = sum(others[sample].strip() == text.strip() for sample, text in answers.items())
        own = {"task": task, "rows": len(answers), "same_answers": same}
        found.append({**own, "kvtrim": mean, "lm-eval": harness})
        print(found[-1], flush=True)
    record = {"machine": provenance(model.device), "model": "smollm2", "results": found}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "agreement.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "| task | rows | kvtrim eval | lm-evaluation-harness 0.4.13 | answers that are the same |",
        "|---|---:|---:|---|---:|",
    ]
    for one in found:
        each = ", ".join(
            f"{name.partition(',')[2]} {100 * score:.1f}" for name, score in one["lm-eval"].items()
        )
        line = f"| {one['task']} | {one['rows']} | {100 * one['kvtrim']:.1f} | {each} | "
        lines.append(f"{line}{one['same_answers']} |")
    (given.out / "agreement.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
