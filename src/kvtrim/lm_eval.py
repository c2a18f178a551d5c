"""lm-evaluation-harness under any method: `kvtrim lm-eval --model kvtrim --model_args ...`.

Source: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/models/huggingface.py. Prompts, token ids,
        truncation and stop strings are its `hf` model's; what changes is the cache.
Rule:   all but the last `tail` tokens of a request's context are read and compressed. The tail and
        what is scored or generated follow, and see only what was kept. One context's continuations
        share its cache, which each leaves as it found it.

With `method=full` log-likelihoods are those of `hf`. With `tail=0` the whole context is read
before anything is evicted: the first token then comes from a pass that saw everything, as in an
ordinary `generate`, and one-token continuations (A, B, C, D) do not notice a method that only
evicts.

A text for perplexity (`loglikelihood_rolling`) is cut into the harness's windows, and a window
into blocks of `stride` tokens; every block is scored after a cache made of all that stands before
it in its window. Each token is predicted once.

The harness has no entry point for models of other packages (its registry is a table in its own
source), so `lm_eval --model kvtrim` needs `register` to be called first: `kvtrim lm-eval` does.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any

import torch

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import likelihoods
from kvtrim.hf.models.load import default_device, load
from kvtrim.methods.settings import split
from kvtrim.version import VERSION

try:  # by name, so that types are the same with the package and without
    registry: Any = import_module("lm_eval.api.registry").model_registry
    HFLM: Any = import_module("lm_eval.models.huggingface").HFLM
    stop_sequences_criteria: Any = import_module("lm_eval.models.utils_hf").stop_sequences_criteria
    tqdm: Any = import_module("tqdm").tqdm
except ImportError as missing:
    raise UsageError(
        f"the harness needs {missing.name or 'lm-eval'}: pip install 'kvtrim[lm-eval]'"
    ) from None

NAME = "kvtrim"
_OWN = ("pretrained", "method", "keep", "tail", "stride", "tokenizer", "device", "dtype")
_OPTIONS = (  # of `hf`, those that mean something once a model is loaded
    "max_length",
    "truncation",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
Request = tuple[Any, list[int], list[int]]  # its text (None for rolling windows), context, answer


class KvtrimLM(HFLM):
    """The harness's `hf` model with a kvtrim cache.

    Args:
        pretrained: what `kvtrim.load` takes: smollm2, a folder, a .gguf file or a Hub id; or a
            model, with its `tokenizer`.
        method, keep: as everywhere; parameters of the method by their names (window=16).
        tail: how many of a context's last tokens are read after the rest was compressed.
        stride: tokens of a text for perplexity that are scored after one cache.
        device, dtype: as `kvtrim.load` takes them.
        batch_size, max_batch_size: taken and not used; contexts are read one at a time.
        options: as `hf` has them: max_length, add_bos_token, prefix_token_id, truncation,
            think_end_token, enable_thinking, chat_template_args.

    Raises:
        UsageError: an unknown method, parameter or budget, or a negative tail.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        method: str = "snapkv",
        keep: int | float | str = 512,
        tail: int = 1,
        stride: int = 512,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        if tail < 0 or stride < 1:
            raise UsageError(f"tail={tail}, stride={stride}: use tail=1 or more (0: see the docs)")
        settings, options = split(method, options)
        for name in options:
            if name not in _OPTIONS:
                raise UnknownNameError("argument", name, {*_OPTIONS, *_OWN, *settings})
        if isinstance(pretrained, str):
            pretrained, tokenizer = load(pretrained, device=device, dtype=dtype)
        self._request = method, keep, settings
        self._tail, self._stride = tail, stride
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=1, **options)
        Cache(self.model, method, keep, **settings)  # refused now rather than after a while

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: size, method and budget."""
        method, keep, settings = self._request
        own = {"method": method, "keep": str(keep), "settings": settings}
        own |= {"tail": self._tail, "stride": self._stride, "version": VERSION}
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model_num_parameters": count, "model_dtype": self.model.dtype, "kvtrim": own}

    def _empty(self, tokens: int) -> Cache:
        """A cache for a prompt of so many tokens; a full one where nothing is compressed."""
        if not tokens:
            return Cache(self.model, "full")
        method, keep, settings = self._request
        own = settings | {"tokenizer": self.tokenizer}
        return Cache(self.model, method, keep, prompt_tokens=tokens, **own)

    def _compress(self, ids: Sequence[int]) -> Cache:
        """A cache of these tokens, evicted."""
        cache = self._empty(len(ids))
        if ids:
            self._read(cache, ids, last=1)
        return cache

    def _read(self, cache: Cache, ids: Sequence[int], last: int = 0) -> torch.Tensor:
        """Read tokens into a cache; gives the logits [n, vocab] of the last (0: of all)."""
        given = torch.tensor([list(ids)], device=self.model.device)
        with torch.no_grad():
            return self.model(input_ids=given, **cache_keyword(cache), logits_to_keep=last).logits[
                0
            ]

    # Log-likelihood

    def _loglikelihood_tokens(
        self, requests: Iterable[Request], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, would greedy decoding say the same) of every continuation."""
        todo = list(requests)
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(todo)), key=lambda n: (-len(todo[n][1]), todo[n][1]))
        bar = tqdm(total=len(todo), disable=disable_tqdm, desc="kvtrim: log-likelihoods")
        with attach(self.model):
            for context, numbers in groupby(order, key=lambda n: todo[n][1]):
                same = list(numbers)
                scored = self._score(context, [todo[n] for n in same])
                for n, result in zip(same, scored, strict=True):
                    found[n] = result
                    if todo[n][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", todo[n][0], result)
                    bar.update(1)
        bar.close()
        return [found[n] for n in range(len(todo))]

    def _score(self, context: list[int], requests: list[Request]) -> Iterator[tuple[float, bool]]:
        """The continuations of one context, as the harness's `hf` model would cut them."""
        longest = max(len(answer) for _, _, answer in requests)
        room = self.max_length + 1
        if longest >= room:
            raise UsageError(
                f"a continuation has {longest} tokens, the window {self.max_length}: there is no "
                "room for its context"
            )
        if requests[0][0] is None:
            yield from (self._in_blocks(context, answer) for _, _, answer in requests)
            return
        for answer_room, own in groupby(
            requests, key=lambda one: max(0, len(context) + len(one[2]) - room)
        ):
            yield from self._after(context[answer_room:], [answer for _, _, answer in own])

    def _after(self, context: list[int], answers: list[list[int]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihoods of answers after one compressed context."""
        cut, first = max(0, len(context) - self._tail), []
        if cut == len(context):  # nothing is held back: the prompt's pass gives the first
            cache = self._empty(cut)
            first = [self._read(cache, context, last=1)]
        else:
            cache = self._compress(context[:cut])
        mark = cache.mark() if cut else None
        for answer in answers:
            if mark is None:  # nothing was read, so there is nothing to go back to
                cache = self._compress([])
            follow = [*context[cut:], *answer[:-1]]
            logits = [*first, *([self._read(cache, follow)] if follow else [])]
            yield _judge(torch.cat(logits)[-len(answer) :], answer)
            if mark is not None:
                cache.rewind(mark)

    def _in_blocks(self, context: list[int], answer: list[int]) -> tuple[float, bool]:
        """A window of a text for perplexity, block by block."""
        total, greedy = 0.0, True
        for start in range(0, len(answer), self._stride):
            block = answer[start : start + self._stride]
            own, same = next(self._after([*context, *answer[:start]], [block]))
            total, greedy = total + own, greedy and same
        return total, greedy

    # Generation

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """What `hf` generates, from a compressed context."""
        options.setdefault("do_sample", bool(options.get("temperature")))
        if not options["do_sample"]:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        stopping = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context))
        with attach(self.model), torch.no_grad():
            ids = context[0].tolist()
            cut = max(0, len(ids) - self._tail)
            cache = self._compress(ids[:cut]) if cut < len(ids) else self._empty(cut)
            cache.expect(len(ids))
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=stopping,
                pad_token_id=self.tokenizer.pad_token_id,
                **cache_keyword(cache),
                **options,
            )


def _judge(logits: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an answer under [T, vocab], and whether it is the most likely one."""
    gold = torch.tensor(answer, device=logits.device)
    log, chosen = likelihoods(logits, gold)
    return float(chosen.sum()), bool((log.argmax(dim=-1) == gold).all())


def register() -> None:
    """Make `--model kvtrim` known to the harness in this process."""
    import_module("lm_eval.models")  # the harness's own models, which it would not add later on
    if NAME not in registry:
        registry.register(NAME, target=KvtrimLM)


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with `--model kvtrim`."""
    register()
    given = [*arguments]
    named = any(word.partition("=")[0] == "--device" for word in given)
    if "--model" in given and not named and not torch.cuda.is_available():
        given += ["--device", str(default_device())]  # its own default is CUDA, there or not
    before, sys.argv = sys.argv, ["kvtrim lm-eval", *given]
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    finally:
        sys.argv = before
