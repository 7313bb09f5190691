"""Who takes part: the library's fused loss, the floor beneath everyone, and the rivals."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from torch import Tensor

from benchmarks.suite.problem import Problem, Rival
from benchmarks.suite.rivals import RIVALS
from wrpo_kernels import linear_preference_loss

FLOOR = "products"  # the bare matrix products of the same rows
# Not in each commit to compare with.
TAKES_ADAPTERS, TAKES_LENGTHS = (
    name in signature(linear_preference_loss).parameters for name in ("adapter", "lengths")
)


def fused(problem: Problem) -> Callable[[], Tensor]:
    setting = problem.setting
    budget = setting.budget_mib
    options = {
        "seq_weight": problem.seq_weight,
        "group": problem.group,
        "num_groups": problem.num_groups,
        "beta": problem.beta,
        "softcap": problem.softcap,
        "logit_scale": problem.logit_scale,
        "num_rows": setting.num_rows,
        "budget_bytes": None if budget is None else budget << 20,
    }
    if TAKES_LENGTHS and problem.device.type != "cpu":
        options |= {"lengths": [setting.response] * setting.sequences, "group": problem.group.cpu()}

    def loss() -> Tensor:
        if problem.adapter is not None and TAKES_ADAPTERS:
            operands, adapter = (problem.hidden, problem.weight), {"adapter": problem.low_rank()}
        else:
            operands, adapter = problem.operands(), {}
        return linear_preference_loss(*operands, problem.labels, problem.ref_logp, **options, **adapter).loss

    return loss


FUSED = Rival("fused", lambda problem: None, fused)
CONTESTANTS = {rival.name: rival for rival in (FUSED, *RIVALS)}
