"""What has been read: columns of the input, which of them are padding, and where prompts stand.

A column is one position of the padded input [B, n]. A token's position counts real tokens only,
so a prompt has the same positions alone and inside a padded batch.
"""

from dataclasses import dataclass, field

import torch

from kvtrim.errors import CacheError, UsageError
from kvtrim.types import Bool, Int, Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass: `columns` new columns, and the real tokens among them."""

    columns: int
    first: list[int]  # position of each prompt's first new token
    real: list[Tensor] | None  # per prompt its columns that hold tokens; None when all do
    at: list[Tensor] | None = None  # per prompt its tokens' positions, where some are left out
    _positions: dict[torch.device, Tensor] = field(default_factory=dict)  # made once per device

    @property
    def rows(self) -> int:
        """Prompts in the batch."""
        return len(self.first)

    def lengths(self) -> list[int]:
        """Each prompt's tokens after this pass, those left out not counted."""
        if self.at is not None:
            return [first + len(at) for first, at in zip(self.first, self.at, strict=True)]
        if self.real is None:
            return [first + self.columns for first in self.first]
        return [first + len(real) for first, real in zip(self.first, self.real, strict=True)]

    def mask(self) -> Bool[Tensor, "B Q"]:
        """Which of the new columns hold a token."""
        mask = torch.ones(self.rows, self.columns, dtype=torch.bool)
        for row, columns in enumerate(self.real or []):
            mask[row] = False
            mask[row, columns] = True
        return mask

    def groups(self) -> list[slice]:
        """Prompts that can be seen together: all if they are of one length, else each alone."""
        if self.real is None and len(set(self.first)) == 1:
            return [slice(0, self.rows)]
        return [slice(row, row + 1) for row in range(self.rows)]

    def positions(self, device: torch.device) -> Int[Tensor, "B 1 Q"]:
        """Positions of the new tokens, when every column holds one."""
        if self.at is not None and device not in self._positions:
            self._positions[device] = torch.stack(self.at)[:, None].int().to(device)
        if device not in self._positions:
            first = torch.tensor(self.first, dtype=torch.int32, device=device)
            steps = torch.arange(self.columns, dtype=torch.int32, device=device)
            self._positions[device] = (first[:, None] + steps)[:, None]
        return self._positions[device]

    def row_positions(self, row: int, device: torch.device) -> Int[Tensor, "1 1 Q"]:
        """Positions of one prompt's new tokens."""
        if self.at is not None:
            return self.at[row][None, None].int().to(device)
        count = self.columns if self.real is None else len(self.real[row])
        first = self.first[row]
        return torch.arange(first, first + count, dtype=torch.int32, device=device)[None, None]


class Reading:
    """The columns read so far.

    `seen` counts columns, `lengths` counts each prompt's real tokens.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.real: Bool[Tensor, "B seen"] | None = None  # None while there is no padding
        self.lengths: list[int] = []

    def plan(self, rows: int, columns: int, mask: Tensor | None) -> Pass:
        """Describe the next pass; nothing is recorded before `record`.

        Args:
            mask: 2-D, [B, seen + columns] or only the new columns; nonzero = a token.

        Raises:
            UsageError: another number of prompts than before, or a mask of the wrong size.
        """
        if self.lengths and len(self.lengths) != rows:
            raise UsageError(
                f"this cache holds {len(self.lengths)} prompts, the input has {rows}; use one "
                "cache per batch"
            )
        first = list(self.lengths) or [0] * rows
        if mask is None:
            return Pass(columns, first, None)
        if mask.ndim != 2 or mask.shape[1] not in (self.seen + columns, columns):
            raise UsageError(
                f"kvtrim needs the 2-D attention mask [{rows}, {self.seen + columns}], got "
                f"{list(mask.shape)}"
            )
        if self.expects(mask, columns):
            return Pass(columns, first, None)
        new = mask[:, -columns:].bool().cpu()
        if bool(new.all()):
            return Pass(columns, first, None)
        return Pass(columns, first, [row.nonzero()[:, 0] for row in new])

    def expects(self, mask: Tensor, columns: int) -> bool:
        """The mask adds only tokens and hides nothing more; one small transfer per pass."""
        if mask.shape[1] != self.seen + columns:
            return False
        past = self.lengths or [0] * mask.shape[0]
        return (mask != 0).sum(-1).tolist() == [length + columns for length in past]

    def masked_again(self, mask: Tensor | None, columns: int) -> list[int] | None:
        """Tokens at each prompt's end that this mask takes back; None if it takes none back.

        What is taken back is padding after a finished answer.

        Raises:
            UsageError: the mask hides a token in the middle, or shows padding as a token.
        """
        if mask is None or self.seen == 0 or mask.shape[1] != self.seen + columns:
            return None
        if self.expects(mask, columns):
            return None
        past = mask[:, : self.seen].bool().cpu()
        before = self.mask(past.shape[0])
        if torch.equal(past, before):
            return None
        gone = before & ~past
        kept_after = (before & past).flip(-1).cumsum(-1).flip(-1) > 0  # a kept token follows
        if bool((past & ~before).any()) or bool((gone & kept_after).any()):
            raise UsageError(
                "the attention mask differs from the one this cache was filled with; "
                "only tokens at the end of a row can be masked later"
            )
        return gone.sum(-1).tolist()

    def record(self, done: Pass) -> None:
        """The pass was read."""
        if self.real is not None or done.real is not None:
            self.real = torch.cat([self.mask(done.rows), done.mask()], dim=1)
        self.seen += done.columns
        self.lengths = done.lengths()

    def forget(self, columns: int) -> list[int]:
        """Drop the newest columns; returns the lengths that remain."""
        if not 0 <= columns <= self.seen:
            raise CacheError(f"cannot take back {columns} tokens, {self.seen} were read")
        self.seen -= columns
        if self.real is None:
            self.lengths = [length - columns for length in self.lengths]
        else:
            self.real = self.real[:, : self.seen]
            self.lengths = self.real.sum(-1).tolist()
        return self.lengths

    def take_back(self, tokens: list[int]) -> list[int]:
        """Turn each prompt's last tokens into padding; returns the lengths that remain."""
        real = self.mask(len(tokens))
        after = real.flip(-1).cumsum(-1).flip(-1)  # tokens from this column on
        self.real = real & (after > torch.tensor(tokens)[:, None])
        self.lengths = self.real.sum(-1).tolist()
        return self.lengths

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these prompts, in this order (beam search)."""
        self.real = None if self.real is None else self.real[rows.cpu()]
        self.lengths = [self.lengths[row] for row in rows.tolist()]

    def mask(self, rows: int) -> Bool[Tensor, "B seen"]:
        """Which columns hold a token."""
        return (
            self.real if self.real is not None else torch.ones(rows, self.seen, dtype=torch.bool)
        )
