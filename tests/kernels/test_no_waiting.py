"""The driver never reads from an accelerator once it knows how many labels count.

Tensors of the meta device, which stands for any accelerator here, have shapes and no values: reading one raises. The
launches themselves, which need a GPU, are left out.
"""

from __future__ import annotations

import pytest
import torch

from wrpo_kernels import linear_token_logp
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.linear_preference_loss import one_pass
from wrpo_kernels.linear_token_logp import passes
from wrpo_kernels.linear_token_logp.contract import for_the_backward, plan_of, rows_of
from wrpo_kernels.linear_token_statistics import contract as statistics
from wrpo_kernels.linear_token_statistics.wanted import Wanted
from wrpo_kernels.lm_head.exp_product import self_check
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.inputs import Asked, HeadOptions, HeadTensors
from wrpo_kernels.lm_head.products import scaled_rows
from wrpo_kernels.lm_head.rows import UNCOUNTED, Rows
from wrpo_kernels.preference_loss.contract import CANDIDATES
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences

M, N, D, V, S, R = 12, 9, 16, 32, 6, 4  # labels, those that count, ..., rank of an adapter
pytestmark = pytest.mark.skipif(triton_backend.missing() is not None, reason=str(triton_backend.missing()))


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def without_launches(monkeypatch):
    from wrpo_kernels.linear_token_statistics import triton_kernel as token_statistics
    from wrpo_kernels.lm_head.exp_product import launch
    from wrpo_kernels.preference_loss import triton_kernel as preference_loss
    from wrpo_kernels.token_logp import triton_kernel as token_logp

    monkeypatch.setattr(triton_backend, "refuses", lambda tensor: None)
    monkeypatch.setattr(
        token_logp, "check_labels_where_free", lambda *arguments: None
    )  # reads them only where it must not wait
    monkeypatch.setattr(token_logp, "rows_kernel", lambda *arguments, **options: None)
    monkeypatch.setattr(token_statistics, "check_labels_where_free", lambda *arguments: None)
    for name in ("_token_statistics_fwd", "_token_statistics_bwd"):
        monkeypatch.setattr(token_statistics, name, NoLaunch())
    for name in ("_preference_loss_fwd", "_sequence_sum_fwd", "_over_rows_fwd"):
        monkeypatch.setattr(preference_loss, name, NoLaunch())
    monkeypatch.setattr(launch, "check_labels_where_free", lambda *arguments: None)
    monkeypatch.setattr(self_check, "mismatch", lambda *call: None)  # waits, once a process
    for name in ("_label_score_fwd", "_exp_product_fwd", "_exp_finish_fwd", "_row_coefficients_fwd"):
        monkeypatch.setattr(launch.product, name, NoLaunch())
    for name in ("_exp_repair_sums_fwd", "_exp_repair_merge_fwd", "_exp_repair_store_fwd"):
        monkeypatch.setattr(launch.repair, name, NoLaunch())


@pytest.fixture
def tensors() -> HeadTensors:
    hidden = torch.empty(M, D, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(V, D, dtype=torch.bfloat16, device="meta")
    low, up = torch.empty(M, R, dtype=torch.float32, device="meta"), torch.empty(V, R, device="meta")
    return HeadTensors(hidden, weight, torch.empty(M, dtype=torch.int64, device="meta"), None, low, up)


def options(asked: Asked, num_rows: int, budget: int = 1 << 20, backend: str = "triton") -> HeadOptions:
    return HeadOptions(1.0, 0.0, 1.0, -100, num_rows, budget, asked, 0.0, False, backend)


BUDGETS = {"all rows fit": 1 << 20, "three rows fit": 3 * 2 * (V + 3 * D)}
ASKED = {
    "nothing": Asked(False, False, False, False, False),
    "hidden": Asked(True, False, False, False, False),
    "head": Asked(True, True, False, True, True),
}


@pytest.mark.parametrize("backend", ["triton", "triton_exp"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("num_rows", [N, M])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_token_log_probs_and_their_gradients_read_nothing_back(asked, num_rows, budget, backend, tensors):
    given = options(asked, num_rows, budget, backend)
    head, rows, plan = Head(tensors, given), rows_of(tensors, given), plan_of(tensors, given)
    unscaled, kept = for_the_backward(tensors, given)
    logp = passes.forward(head, rows, plan, unscaled, kept)
    assert rows.spread(logp).shape == (M,)
    if asked.only_hidden:
        assert rows.spread(scaled_rows(unscaled, logp[:, None])).shape == (M, D)
    if asked.of_head:
        gradients = Gradients(tensors.hidden, head, asked, 2)
        passes.backward(head, rows, plan, kept, logp[:, None], logp, gradients)
        shapes = [total.shape for total in gradients.totals() if total is not None]
        assert shapes == [(M, D), (V, D), (M, R), (V, R)]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("num_rows", [N, M])
def test_token_statistics_and_their_gradients_read_nothing_back(num_rows, budget, tensors):
    given, wanted = options(ASKED["head"], num_rows, budget), Wanted(*[True] * 4)
    head, rows = Head(tensors, given, statistics.CANDIDATES), rows_of(tensors, given)
    plan = statistics.plan_of(tensors, given)
    kept = tensors.hidden.new_empty(plan.keep, V)
    values, top1 = statistics.passes.forward(head, rows, plan, kept, wanted)
    assert (rows.spread(values).shape, rows.spread(top1).shape) == ((M, 6), (M,))
    gradients = Gradients(tensors.hidden, head, given.asked, 2)
    statistics.passes.backward(head, rows, plan, kept, values, values, gradients, wanted)
    assert all(total.is_meta for total in gradients.totals() if total is not None)


@pytest.mark.parametrize("backend", ["triton", "triton_exp"])
@pytest.mark.parametrize("num_rows", [N, M])
def test_one_pass_reads_nothing_back_while_the_rows_fit(num_rows, backend, tensors):
    given = options(ASKED["head"], num_rows, backend=backend)
    head, rows = Head(tensors, given), rows_of(tensors, given)
    gradients = Gradients(tensors.hidden, head, given.asked, 1)
    size, number = torch.empty(S, device="meta"), torch.empty(S, dtype=torch.int64, device="meta")
    sequences = Sequences(None, size, number, number, None, None, None, None)
    loss = LossArguments(sequences, 2, Family(0.1, 0.0, "sigmoid", 0.0, 0.05, False))
    kernel = choose("triton", CANDIDATES, size)
    result, _ = one_pass.run(head, rows, loss, None, 2, one_pass.Limits(N + M, N + M, N + M), gradients, kernel)
    assert result.loss.shape == (2,) and result.logp.shape == (S,)


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("lengths", [[4, 1, 2, 1, 1, 0], [1, 2, 1, 2, 2, 1]], ids=["one group beyond", "both beyond"])
def test_groups_beyond_the_budget_are_planned_by_what_the_host_knows(lengths, nll, tensors):
    given = options(ASKED["head"], N)
    head, rows = Head(tensors, given), rows_of(tensors, given)
    gradients = Gradients(tensors.hidden, head, given.asked, 2)
    size, number = torch.empty(S, device="meta"), torch.empty(S, dtype=torch.int64, device="meta")
    sequences = Sequences(None, size, number, number, size if nll else None, None, None, None)
    loss = LossArguments(sequences, 2, Family(0.1, 0.0, "sigmoid", 0.0, 0.05, False))
    kernel = choose("triton", CANDIDATES, size)
    on_host = torch.tensor([lengths, [0, 0, 0, 1, 1, 1]])
    result, _ = one_pass.run(head, rows, loss, on_host, 2, one_pass.Limits(3, 3, 3), gradients, kernel)
    assert result.loss.shape == (2,) and result.logp.shape == (S,)
    with pytest.raises(NotImplementedError):
        one_pass.run(head, rows, loss, None, 2, one_pass.Limits(3, 3, 3), gradients, kernel)


def test_a_count_that_is_not_known_is_read_from_the_device(tensors):
    """So these tensors do catch what waits."""
    with pytest.raises(NotImplementedError, match="nonzero"):
        Rows.that_count(tensors.hidden, tensors.target, -100, UNCOUNTED)


@pytest.mark.parametrize(("num_rows", "error"), [(3, ValueError), (13, ValueError), (-1, ValueError), (4.0, TypeError)])
def test_a_wrong_count_of_rows_is_named_on_the_cpu(num_rows, error):
    target = torch.tensor([1, -100, 2, 3, -100, 0])
    assert linear_token_logp(torch.ones(6, 3), torch.ones(5, 3), target, num_rows=4).shape == (6,)
    with pytest.raises(error, match="num_rows"):
        linear_token_logp(torch.ones(6, 3), torch.ones(5, 3), target, num_rows=num_rows)
