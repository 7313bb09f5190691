"""Loss and gradients of a contestant beside float64.

The truth is the library's own `reference` arithmetic on operands in float64 that start from the very numbers the
contestants get; `benchmarks.run` lets the op tests, which hold that arithmetic against truths written apart from it,
pass before anything is timed. An error is ||got - truth|| / ||truth|| over a slice of the rows of a gradient (every
k-th row, at most 4 million elements), of the loss |got - truth| / |truth|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.suite.problem import Problem
from wrpo_kernels import linear_preference_loss

SLICE = 1 << 22  # elements of each gradient that are compared
# Above these a gradient is another gradient, not the same one rounded otherwise. In units of the dtype's epsilon: a
# bfloat16 logit of size 4 is off by half an eps of 4, so p is off by 2 eps, and delta, dh and dW are rounded once more
# each, as are the gradients of contestants that add up chunks in bfloat16. In float32 the coefficient carries the
# rounding of a sum of hundreds of log-probs of size 12 and the products walk sqrt(V) steps.
LOOSEST = {"bfloat16": 16.0, "float16": 16.0, "float32": 1000.0}


class Errors(NamedTuple):
    loss: float
    dh: float | None
    dW: float | None  # of a LoRA head: of B

    def too_large(self, dtype: str) -> str | None:
        """The first result that is not the truth rounded, in words."""
        most = LOOSEST[dtype] * torch.finfo(getattr(torch, dtype)).eps
        for name, error in zip(self._fields, self, strict=True):
            if error is not None and not error <= most:
                return f"{name} is off by {error:.2g} (at most {most:.2g} in {dtype})"
        return None


class Truth:
    """Loss and slices of the gradients of a problem, in float64."""

    def __init__(self, problem: Problem):
        hidden, weight = (x.detach().double() for x in problem.operands())
        trains = problem.setting.head != "no_grad"
        hidden.requires_grad_(trains)
        weight.requires_grad_(problem.setting.trains_head)
        out = linear_preference_loss(
            hidden,
            weight,
            problem.labels,
            problem.ref_logp,
            seq_weight=problem.seq_weight,
            group=problem.group,
            num_groups=problem.num_groups,
            beta=problem.beta,
            softcap=problem.softcap,
            logit_scale=problem.logit_scale,
            backend="reference",
        )
        self.loss, self.gradients = float(out.loss.detach()), {}
        if trains:
            out.loss.backward()
            self.gradients = {name: sliced(grad).clone() for name, grad in leaf_gradients(problem, hidden, weight)}

    def errors(self, problem: Problem, loss: Tensor) -> Errors:
        """Of the loss and of the gradients that stand in the leaves of `problem`."""
        found: dict[str, float | None] = {"dh": None, "dW": None}
        for name, truth in self.gradients.items():
            got = problem.leaves()[name].grad
            error = float("nan") if got is None else float((sliced(got).double() - truth).norm() / truth.norm())
            found["dW" if name == "dB" else name] = error
        return Errors(abs(float(loss.detach()) - self.loss) / abs(self.loss), found["dh"], found["dW"])


def sliced(gradient: Tensor) -> Tensor:
    """Every k-th row of [..., D], so that at most SLICE elements remain."""
    rows = gradient.flatten(0, -2)
    return rows[:: max(1, -(-rows.numel() // SLICE))]


def leaf_gradients(problem: Problem, hidden: Tensor, weight: Tensor):
    """Names and gradients of the leaves from those of the operands; dA, which follows from dh alone, is left out."""
    width = problem.setting.width
    if problem.adapter is None:
        yield "dh", hidden.grad
        if weight.grad is not None:
            yield "dW", weight.grad
        return
    yield "dh", hidden.grad[..., :width] + hidden.grad[..., width:] @ problem.adapter[0].detach().double()
    yield "dB", weight.grad[:, width:]
