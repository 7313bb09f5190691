"""A language-model head over one chunk of rows: the logits of the chunk live in a buffer, then become their delta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from wrpo_kernels.backends import choose
from wrpo_kernels.checks import check_labels
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.products import logits_into
from wrpo_kernels.rows import Rows
from wrpo_kernels.token_logp.contract import CANDIDATES as ROW_KERNELS
from wrpo_kernels.token_logp.contract import logp_dtype
from wrpo_kernels.triton_backend import FusedTritonBackend

CANDIDATES = (*ROW_KERNELS, FusedTritonBackend("wrpo_kernels.linear_token_logp.triton_kernel"))


def no_autocast(like: Tensor) -> AbstractContextManager:
    """The types of the products are settled: autocast, which would cast them again, stays out."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def labels_by_position(name: str, target: Tensor, ignore_index: int, vocabulary: int) -> Iterator[None]:
    """A row kernel sees compacted rows; a label that it refuses is reported where the caller wrote it."""
    try:
        yield
    except ValueError:
        check_labels(name, target.reshape(-1), ignore_index, vocabulary)
        raise


class Head:
    """`weight` [V, D] in the type of the hidden states, the transform of the logits, and the row kernel."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, transform: LogitTransform, ignore_index: int, backend: str | None
    ):
        self.weight = weight.to(hidden.dtype)
        self.transform = transform
        self.ignore_index = ignore_index
        self.kernel = choose("linear_token_logp", backend, CANDIDATES, hidden)
        self.logp_dtype = logp_dtype(hidden.dtype)

    @property
    def is_fused(self) -> bool:
        """Whether log-probs come straight from the hidden states, without a buffer of logits."""
        return isinstance(self.kernel, FusedTritonBackend)

    def logp_of(self, rows: Rows, logp: Tensor) -> None:
        hidden = rows.hidden(0, len(rows))
        self.kernel.logp_of_hidden(hidden, self.weight, rows.target, self.ignore_index, self.transform, logp)

    def logp_into(self, logp: Tensor, rows: Rows, first: int, last: int, buffer: Tensor) -> None:
        """Log-probs of rows [first, last) into `logp` [n]; the buffer [>= n, V] is left with the logits."""
        self._run(self.kernel.forward, logp, rows.hidden(first, last), rows.target[first:last], buffer)

    def delta_into(self, logp: Tensor, rows: Rows, first: int, last: int, buffer: Tensor) -> Tensor:
        """The same, and returns the part of the buffer [n, V] that now holds d logp / d (h W^T)."""
        self._run(self.kernel.delta_, logp, rows.hidden(first, last), rows.target[first:last], buffer)
        return buffer[: last - first]

    def _run(self, kernel, logp: Tensor, hidden: Tensor, target: Tensor, buffer: Tensor) -> None:
        logits = logits_into(buffer[: hidden.shape[0]], hidden, self.weight)
        kernel(logits, target, self.ignore_index, self.transform, logp, torch.empty_like(logp))
