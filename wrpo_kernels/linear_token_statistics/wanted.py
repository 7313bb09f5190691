"""Which statistics a call asks for, and where each stands among the values of a row."""

from __future__ import annotations

from typing import NamedTuple

COLUMNS = ("logp", "lse", "entropy", "mean_logits", "log_sum_sq_probs", "lse_rest")  # lse + lse_rest has all digits


class Wanted(NamedTuple):
    """What is made beside logp and the log-sum-exp; the others may be made too, or are 0, and -1 for `top1`."""

    entropy: bool
    mean_logits: bool
    log_sum_sq_probs: bool
    top1: bool
