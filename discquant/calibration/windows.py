# SPDX-License-Identifier: Apache-2.0
"""Windows of token ids: what calibration and evaluation read, and how a stream of tokens is cut into them.

The tail of a stream is padded on the right and masked, never dropped. Padding stands behind every
real token, so that under causal attention a model needs no attention mask to ignore it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows with the mask of what counts. Build them with `Windows.make`, which checks and hashes.

    Attributes:
        input_ids: Token ids, int64, [rows, seqlen].
        mask: True where the token is text and its position counts in the loss, False on padding; bool, same shape.
        digest: SHA-256 of shape, ids and mask, in hexadecimal.
        source: Where the tokens came from, for reports.
    """

    input_ids: Tensor
    mask: Tensor
    digest: str
    source: str

    @classmethod
    def make(cls, input_ids: Tensor, mask: Tensor | None = None, source: str = "") -> Windows:
        """Check, copy to contiguous CPU tensors and hash.

        Args:
            input_ids: Any integer dtype, [rows, seqlen], no negative value.
            mask: bool, same shape; None counts every token.
            source: For reports.

        Returns:
            The windows.

        Raises:
            ValueError: Shapes or dtypes disagree, or an id is negative.
        """
        if (
            input_ids.ndim != 2
            or input_ids.is_floating_point()
            or input_ids.is_complex()
            or input_ids.dtype == torch.bool
        ):
            raise ValueError(
                "Windows: input_ids must be integers of shape [rows, seqlen], "
                f"got {input_ids.dtype} {list(input_ids.shape)}"
            )
        ids = input_ids.detach().to(device="cpu", dtype=torch.int64, copy=True).contiguous()
        counted = (
            torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.detach().to("cpu", copy=True)
        )
        counted = counted.contiguous()
        if counted.shape != ids.shape or counted.dtype != torch.bool:
            raise ValueError(
                f"Windows: mask must be bool of the shape of input_ids = {list(ids.shape)}, "
                f"got {counted.dtype} {list(counted.shape)}"
            )
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"Windows: input_ids must be at least 0, got {int(ids.min())}")
        sha = hashlib.sha256(f"windows {ids.shape[0]} {ids.shape[1]}\n".encode())
        sha.update(ids.numpy().astype("<i8", copy=False).tobytes())
        sha.update(counted.numpy().tobytes())
        return cls(ids, counted, sha.hexdigest(), source)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seqlen(self) -> int:
        """Tokens per window."""
        return int(self.input_ids.shape[1])

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.mask.sum())

    def rows(self, index: Tensor | Sequence[int] | slice) -> Windows:
        """Select windows, in the order of `index`.

        Args:
            index: int64 tensor or sequence of row numbers, or a slice.

        Returns:
            New windows with a digest of their own.

        Raises:
            IndexError: A row number is out of range.
        """
        if not isinstance(index, (slice, Tensor)):
            index = torch.tensor(list(index), dtype=torch.int64)
        return Windows.make(self.input_ids[index], self.mask[index], self.source)

    def split(self, n: int) -> tuple[Windows, Windows]:
        """Split into the first `n` windows and the rest.

        Raises:
            ValueError: `n` is negative or larger than the number of windows.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"Windows.split: n must be in [0, {len(self)}], got {n}")
        return self.rows(slice(0, n)), self.rows(slice(n, None))


def cut(stream: Tensor, seqlen: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut one stream of tokens into windows; the last is padded on the right.

    Args:
        stream: Token ids, int64, [tokens].
        seqlen: Tokens per window.
        pad_id: Id written where the stream has ended.

    Returns:
        ids: int64, [ceil(tokens / seqlen), seqlen].
        mask: bool, same shape, False on padding.
    """
    missing = -stream.numel() % seqlen
    ids = torch.nn.functional.pad(stream, (0, missing), value=pad_id).view(-1, seqlen)
    mask = torch.nn.functional.pad(torch.ones_like(stream, dtype=torch.bool), (0, missing)).view(-1, seqlen)
    return ids, mask


def cut_rows(rows: Tensor, mask: Tensor, seqlen: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut every row on its own; windows that would be nothing but padding are left out.

    Args:
        rows: Token ids, int64, [rows, width].
        mask: bool, same shape, False on padding.
        seqlen: Tokens per window, at most `width`.
        pad_id: Id written where a row has ended.

    Returns:
        ids: int64, [windows, seqlen].
        mask: bool, same shape.
    """
    missing = -rows.shape[1] % seqlen
    ids = torch.nn.functional.pad(rows, (0, missing), value=pad_id).view(-1, seqlen)
    counted = torch.nn.functional.pad(mask, (0, missing)).view(-1, seqlen)
    kept = counted.any(dim=1)
    return ids[kept], counted[kept]
