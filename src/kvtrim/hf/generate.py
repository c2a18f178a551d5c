"""Running a model over a kvtrim cache: reading a prompt in chunks, generating with a clock."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from typing import Annotated, Any

import torch
from transformers import Cache as TransformersCache
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.hf.base import BaseCache, cache_in, cache_keyword
from kvtrim.hf.decode import Loop, why_plain
from kvtrim.methods.ranges import (
    Positive,
    Range,
    Share,
    Some,
    Temperature,
    Tokens,
    annotations_of,
    check,
)
from kvtrim.types import Float, Int, Tensor

_INPUTS = {"self", "inputs", "kwargs", "custom_generate", "max_new_tokens"}  # ours to give

Progress = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and out of how much."""


@dataclass(frozen=True)
class Generated:
    """New tokens and when they came, in seconds since the prompt was handed over."""

    token_ids: list[int]
    ttft_s: float  # time to first token
    tpot_s: float | None  # time per output token after the first; None if there was one only
    decoding: str  # "captured", or "plain" and why
    capture_s: float = 0.0  # what making the graph took; part of no other figure


@dataclass
class _Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    device: torch.device
    before: int  # tokens of the prompt
    on_first: Callable[[], None]
    on_token: Callable[[int], None]
    times: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of prompt and answer, at those times

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        self.lengths.append(input_ids.shape[1])
        if len(self.times) == 1:
            self.on_first()
        self.on_token(input_ids.shape[1] - self.before)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watch(
    model: Any, cache: TransformersCache, tokens: int, progress: Progress | None
) -> Iterator[None]:
    """Report how far a prompt of so many tokens has come into a cache, layer by layer."""
    if progress is None:
        yield
        return
    decoder, base, columns, before, shown = model.get_decoder(), 0, 0, 0, 0

    def is_ours(kwargs: Any) -> bool:
        """Other threads may use the model meanwhile; to them torch may hand no keywords."""
        return isinstance(kwargs, dict) and cache_in(kwargs) is cache

    def begin(module: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        nonlocal columns, before
        if not is_ours(kwargs):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is not None and ids.shape[1] > 1:
            columns, before = ids.shape[1], cache.get_seq_length()

    def end(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        nonlocal base, columns, shown
        if is_ours(kwargs) and columns:
            base, columns = base + cache.get_seq_length() - before, 0
            if base > shown:  # a part stood for all of these
                shown = min(tokens, base)
                progress("reading", shown, tokens)

    def pass_layer(
        number: int, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None
    ) -> None:
        nonlocal shown
        if is_ours(kwargs) and columns:
            shown = max(shown, min(tokens, base + columns * number // len(decoder.layers)))
            progress("reading", shown, tokens)

    hooks = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end, with_kwargs=True),
    ]
    for number, block in enumerate(decoder.layers, start=1):
        hooks.append(block.register_forward_hook(partial(pass_layer, number), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read(
    model: Any,
    ids: Int[Tensor, "B n"],
    cache: TransformersCache,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Read tokens into a cache, at most `chunk` of them at a time; the logits are not wanted."""
    if isinstance(cache, BaseCache):
        first = min(chunk or ids.shape[1], ids.shape[1])
        cache.require_reach(first, cache.seen + ids.shape[1])
    with torch.no_grad(), watch(model, cache, ids.shape[1], progress):
        for part in ids.split(chunk or ids.shape[1], dim=1):
            model(input_ids=part, **cache_keyword(cache), logits_to_keep=1)


def generate(
    model: Any,
    ids: Int[Tensor, "1 n"],
    cache: TransformersCache,
    max_new_tokens: int,
    chunk: int | None = None,
    on_first: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    first: Float[Tensor, "1 V"] | None = None,
    **options: Any,
) -> Generated:
    """Continue `ids`, of which the cache may have read a part, with transformers' `generate`.

    Args:
        chunk: read at most so many tokens in one pass.
        on_first: called when the first new token is there.
        progress: told of every layer of the prompt and every new token.
        first: logits of the token after `ids`, where the cache has read all of them; for greedy
            decoding and sampling (`kvtrim.hf.decode.one_by_one`).
        options: as `model.generate` takes them; greedy unless they say otherwise.
    """

    def on_token(count: int) -> None:
        if progress is not None:
            progress("answering", count, max_new_tokens)

    clock = _Clock(model.device, ids.shape[1], on_first, on_token)
    criteria = StoppingCriteriaList([*options.pop("stopping_criteria", []), clock])
    start = time.perf_counter()
    unread = ids[:, cache.get_seq_length() :]
    if isinstance(cache, BaseCache):
        cache.expect(ids.shape[1])
        at_once = min(chunk or unread.shape[1], unread.shape[1])
        cache.require_reach(at_once, ids.shape[1] + max_new_tokens - 1)
    with watch(model, cache, unread.shape[1], progress):
        if chunk is not None and unread.shape[1] > chunk:
            last = (unread.shape[1] - 1) % chunk + 1
            read(model, unread[:, :-last], cache, chunk)
        config = options.get("generation_config")
        beams = options.get("num_beams") or (config and config.num_beams) or 1
        if (
            beams > 1 and cache.get_seq_length()
        ):  # transformers repeats the input, not what was read
            cache.batch_repeat_interleave(beams)
        reason = why_plain(model, cache, max_new_tokens, options)
        loop = None
        if reason is None or first is not None:
            loop = Loop(options.get("streamer"), reason, first)
        with _refuse_plainly(options):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **cache_keyword(cache),
                max_new_tokens=max_new_tokens,
                stopping_criteria=criteria,
                custom_generate=loop,
                **{**_unsaid(model, config), **options},
            )
    return _with_times(out[0, ids.shape[1] :].tolist(), start, clock, loop, reason)


@contextmanager
def _refuse_plainly(options: Mapping[str, Any]) -> Iterator[None]:
    """What transformers says of options that cannot be, or not together, as a `UsageError`."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text, names = " ".join(str(error).split()), ", ".join(sorted(options))
        if isinstance(error, KvtrimError) or not options:
            raise
        if "probability tensor" in text:
            raise UsageError(
                f"{names}: no token is left with a probability above 0; take milder values"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise UsageError(f"transformers' generate refuses {names}: {text:.300}") from error


def _with_times(
    new: list[int], start: float, clock: _Clock, loop: Loop | None, reason: str | None
) -> Generated:
    """Times from the clock's; making a graph belongs to no token.

    Where one pass gave several tokens (assisted decoding), they share its time.
    """
    times, capture_s = clock.times, 0.0
    steps = clock.lengths[-1] - clock.lengths[0]
    if loop is not None:
        reason, capture_s = loop.plain, loop.capture_s
    tpot = (times[-1] - times[0] - capture_s) / steps if steps else None
    decoding = "captured" if reason is None else f"plain: {reason}"
    return Generated(new, times[0] - start, tpot, decoding, capture_s)


class Sampling:
    """What options of transformers' `generate` may be, where it says so late or not at all."""

    num_beams: Some
    num_return_sequences: Some
    temperature: Temperature | None
    top_k: Tokens | None
    top_p: Annotated[float, Range(0, 1, above=True)] | None
    min_p: Share | None
    repetition_penalty: Positive | None
    no_repeat_ngram_size: Tokens | None
    min_new_tokens: Tokens | None


@cache
def sampling_names() -> frozenset[str]:
    """Every option of transformers' `generate`."""
    own = signature(vars(GenerationMixin)["generate"]).parameters.keys()
    return frozenset(own | vars(GenerationConfig()).keys()) - _INPUTS


_REFUSED = {
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
        "a result holds texts and their tokens; call model.generate with a kvtrim.Cache for more",
    ),
    "output_hidden_states": "a result holds texts and their tokens; call model.generate for more",
    "num_return_sequences": "one answer per question; for more, call model.generate",
    "max_length": "say how long the answer may be: max_new_tokens",
    "prefill_chunk_size": "say prefill_chunk, which knows where the prompt ends",
    "cache_implementation": "the cache is kvtrim's; choose it by method and keep",
}
_HARMLESS = {"num_return_sequences": 1}


def require_sampling(options: Mapping[str, Any]) -> None:
    """Refuse what transformers would refuse late, or take for something else.

    Settings of a `generation_config` among the options count like the others.

    Raises:
        UsageError: naming the option.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise UsageError(
            f"generation_config={config!r:.60}: expected a transformers.GenerationConfig"
        )
    set_there = {} if config is None else vars(config)
    asked = {name: value for name, value in set_there.items() if value is not None} | {**options}
    known = annotations_of(Sampling)
    for name in known.keys() & asked.keys():
        check(name, asked[name], known[name])
    for name, instead in _REFUSED.items():
        if asked.get(name) and asked[name] != _HARMLESS.get(name):
            raise UsageError(f"{name}={asked[name]!r} has no meaning here: {instead}")
    if asked.get("use_cache") is False:
        raise UsageError("use_cache=False would read everything again: leave it out")


def _unsaid(model: Any, config: GenerationConfig | None) -> dict[str, Any]:
    """Greedy decoding where nobody says otherwise, also if the model's own configuration does."""
    pad = model.generation_config.pad_token_id
    if pad is None:
        eos = model.generation_config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos
    greedy = dict.fromkeys(("temperature", "top_p", "top_k")) | {"do_sample": False}
    if config is None:
        return {**greedy, "pad_token_id": pad}
    own = {"pad_token_id": pad} if config.do_sample else {**greedy, "pad_token_id": pad}
    return {name: value for name, value in own.items() if getattr(config, name) is None}


def plain_cache(model: Any) -> TransformersCache:
    """What transformers uses by default: a full cache that grows."""
    return DynamicCache(config=model.config)


def stored_bytes(cache: TransformersCache) -> tuple[int, int]:
    """Bytes held and bytes that a full cache would hold, for kvtrim's cache and for any other."""
    if isinstance(cache, BaseCache):
        return cache.held_bytes, cache.full_bytes
    layers: list[Any] = list(cache.layers)
    held = sum(x.keys.nbytes + x.values.nbytes for x in layers if x.is_initialized)
    return held, held


def likelihoods(
    logits: Float[Tensor, "T V"], tokens: Int[Tensor, " T"]
) -> tuple[Float[Tensor, "T V"], Float[Tensor, " T"]]:
    """Log-probabilities of all tokens after each place, and of the one that came there."""
    log = logits.float().log_softmax(dim=-1)
    return log, log.gather(1, tokens[:, None])[:, 0]


def mean_entries(cache: TransformersCache) -> float:
    """Entries per KV head on average, for kvtrim's cache and for any other."""
    layers: list[Any] = list(cache.layers)
    if isinstance(cache, BaseCache):
        counts = [float(layer.float().mean()) for layer in cache.entries()]
    else:
        counts = [float(layer.keys.shape[2]) for layer in layers]
    return sum(counts) / len(counts)
