"""The decoding loop of `generate`: from a prompt that was read before, and with captured steps.

It is handed to transformers as `custom_generate`, so logits processors, stopping criteria and
generation settings are prepared by transformers as ever, and the tokens are those of its own loop.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from kvtrim.engine.graph import Stepper, Steps, obstacle
from kvtrim.hf.base import cache_in, cache_keyword
from kvtrim.hf.batch import positions
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.architectures import head_width
from kvtrim.hf.rotary import changes_with_length
from kvtrim.kernels.available import WIDEST
from kvtrim.types import Float, Int, Tensor

_Step = Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B V"]]

LEAST = 8
"""New tokens from which a capture, which costs about three of them, is worth it."""

_OURS = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"}
_OURS |= {"no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "eos_token_id", "streamer"}
_OURS |= {"pad_token_id", "stop_strings", "tokenizer", "logits_processor", "stopping_criteria"}
_OURS |= {"min_new_tokens", "min_length", "sequence_bias", "generation_config"}


def why_plain(
    model: Any, cache: Any, max_new_tokens: int, options: Mapping[str, Any]
) -> str | None:
    """Why decoding goes through transformers' own loop; None if its steps can be captured."""
    if not isinstance(cache, Cache):
        return "not a kvtrim cache"
    if max_new_tokens < LEAST:
        return f"fewer than {LEAST} new tokens"
    foreign = [name for name, value in options.items() if name not in _OURS and value is not None]
    foreign = [name for name in foreign if not (name == "num_beams" and options[name] == 1)]
    if foreign:
        return f"{', '.join(sorted(foreign))} asked for"
    if not one_by_one(options.get("generation_config") or model.generation_config):
        return "beams or another search asked for"
    if cache.stock_layers():
        return "some of the model's layers slide"
    if changes_with_length(model):
        return "the model's RoPE changes with the length"
    if is_spread(model):
        return "the model is spread over several devices"
    own = model.config.get_text_config(decoder=True)
    if head_width(own) > WIDEST:
        return f"heads are wider than {WIDEST}"
    return obstacle(cache.session, model.device, model.dtype)


def is_spread(model: Any) -> bool:
    """Whether its layers are on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def one_by_one(config: Any) -> bool:
    """Whether a generation configuration chooses one token after the other, as `Loop` does."""
    return config.get_generation_mode().value in ("greedy_search", "sample")


@contextmanager
def open_stepper(model: Any, cache: Cache, room: int) -> Iterator[Stepper]:
    """Captured steps of a model over a cache whose prompt was read; see `engine.graph.obstacle`.

    The model has to stay attached. The caller tells the cache which tokens were read, if it wants
    to go on with it: `cache.token_ids`.
    """

    def forward(ids: Int[Tensor, "B 1"], positions: Int[Tensor, "B 1"]) -> Tensor:
        asked = {"position_ids": positions, **cache_keyword(cache), "logits_to_keep": 1}
        return model(input_ids=ids, **asked).logits[:, -1]

    with torch.no_grad():
        stepper = Stepper(forward, Steps(cache.session, room))
        try:
            yield stepper
        finally:
            stepper.close()


class Loop:
    """A loop for `model.generate(custom_generate=...)`, where tokens are chosen one by one.

    Args:
        streamer: transformers does not hand it on to a loop of one's own.
        plain: why the steps are not captured; by default `why_plain` gave no reason.
        first: logits of the token after a prompt that the cache has read to its end.
    """

    def __init__(
        self,
        streamer: Any = None,
        plain: str | None = None,
        first: Float[Tensor, "B V"] | None = None,
    ):
        self.streamer, self.plain, self._first = streamer, plain, first
        self.capture_s = 0.0  # what making the graph took

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "B n"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Int[Tensor, "B m"]:
        """Continue every row until its stopping criteria hold, as transformers' `_sample` does."""
        cache: Any = cache_in(model_kwargs)
        choose = _Choice(logits_processor, generation_config, stopping_criteria)
        unfinished = torch.ones_like(input_ids[:, 0])
        room = generation_config.max_length - input_ids.shape[1]

        def extend(ids: Tensor, logits: Tensor) -> bool:
            """Whether every row has ended with its new token."""
            nonlocal input_ids, unfinished
            input_ids = torch.cat([ids, choose(ids, logits, unfinished)[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(input_ids[:, -1].cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            return bool(unfinished.max() == 0)

        first = self._first
        done = extend(input_ids, _read(model, input_ids, model_kwargs) if first is None else first)
        if not done:
            with self._steps(model, cache, room) as step:
                while not done:
                    done = extend(input_ids, step(input_ids[:, -1:]))
            if cache.token_ids is not None:
                cache.token_ids = input_ids[:, : cache.seen].clone()
        if self.streamer is not None:
            self.streamer.end()
        return input_ids

    @contextmanager
    def _steps(self, model: Any, cache: Cache, room: int) -> Iterator[_Step]:
        if self.plain is not None:
            yield lambda ids: _feed(model, cache, ids)
            return
        start = perf_counter()
        with open_stepper(model, cache, room) as step:
            self.plain, self.capture_s = step.plain, perf_counter() - start
            yield step


def _feed(model: Any, cache: Cache, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """One more token of every row."""
    at = positions(cache, ids.shape[1]).to(ids.device)
    asked = {"position_ids": at, **cache_keyword(cache), "logits_to_keep": 1}
    return model(input_ids=ids, **asked).logits[:, -1]


def _read(model: Any, input_ids: Int[Tensor, "B n"], kwargs: dict[str, Any]) -> Tensor:
    """Feed the part of the prompt that the cache has not read; the next token's logits."""
    cache: Any = cache_in(kwargs)
    seen = cache.get_seq_length()
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=input_ids.shape[1] - seen,
        is_first_iteration=seen == 0,
        **kwargs,
    )
    return model(**inputs, return_dict=True).logits[:, -1]


class _Choice:
    """The next token of every row, as transformers chooses it."""

    def __init__(self, processors: Any, config: Any, criteria: Any):
        self._processors, self._sample = processors, config.do_sample
        stops = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._pad = config._pad_token_tensor if stops else None

    def __call__(self, ids: Tensor, logits: Tensor, unfinished: Tensor) -> Int[Tensor, " B"]:
        """One token per row; rows that have ended get padding."""
        scores = self._processors(ids, logits.to(torch.float32, copy=True))
        if self._sample:
            chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            chosen = scores.argmax(dim=-1)
        if self._pad is None:
            return chosen
        return chosen * unfinished + self._pad.to(chosen.device) * (1 - unfinished)
