"""The next token of one answer from its logits."""

import torch

from kvtrim.methods.ranges import COLDEST
from kvtrim.serve.request import Sampling
from kvtrim.types import Float, Int, Tensor


class Sampler:
    """Chooses one answer's tokens; what it draws depends on its seed alone, not on others.

    Args:
        repetition: the penalty of the model's own configuration, which `kvtrim.generate` obeys
            too; 1.0 for none.
    """

    def __init__(self, sampling: Sampling, device: torch.device, repetition: float = 1.0):
        self._how, self._repetition = sampling, repetition
        self._draw = torch.Generator(device=device)
        if sampling.seed is None:
            self._draw.seed()
        else:
            self._draw.manual_seed(sampling.seed % 2**63)

    def choose(
        self, logits: Float[Tensor, " vocabulary"], prompt: list[int], written: list[int]
    ) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        """A token, its log-probability, and the likeliest tokens with theirs, if asked for.

        Log-probabilities are the model's, before temperature and penalties.
        """
        how, scores = self._how, logits.float()
        raw = scores
        if self._repetition != 1.0:
            scores = _penalise(scores, prompt + written, self._repetition)
        if written and (how.presence_penalty or how.frequency_penalty):
            ids, counts = torch.tensor(written, device=scores.device).unique(return_counts=True)
            scores = scores.clone()
            scores[ids] -= how.presence_penalty + how.frequency_penalty * counts
        if how.temperature < COLDEST:
            chosen = int(scores.argmax())
        else:
            chosen = self._sample(scores / how.temperature)
        if how.logprobs is None:
            return chosen, None, ()
        logprobs = raw.log_softmax(dim=-1)
        values, ids = logprobs.topk(how.logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return chosen, float(logprobs[chosen]), top

    def _sample(self, scores: Float[Tensor, " vocabulary"]) -> int:
        """One of the likeliest tokens by chance."""
        how = self._how
        if how.top_k:
            least = scores.topk(min(how.top_k, scores.shape[0])).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        shares, ids = scores.softmax(dim=-1).sort(descending=True)
        before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(before >= how.top_p, 0.0)
        return int(ids[torch.multinomial(shares, 1, generator=self._draw)])


def _penalise(
    scores: Float[Tensor, " vocabulary"], ids: list[int], penalty: float
) -> Float[Tensor, " vocabulary"]:
    """Tokens that were there already are less likely.

    Source: Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    seen: Int[Tensor, " n"] = torch.tensor(ids, device=scores.device).unique()
    own, scores = scores[seen], scores.clone()
    scores[seen] = torch.where(own < 0, own * penalty, own / penalty)
    return scores
