"""`shift=` on the doors from hidden states: labels as Hugging Face has them, and no hidden state copied for it."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from doors import SMALL_BUDGET, S, T, general, tensors

from wrpo_kernels import (
    linear_dpo_loss,
    linear_ipo_loss,
    linear_preference_loss,
    linear_simpo_loss,
    linear_token_logp,
    linear_wrpo_loss,
)

CPU = torch.device("cpu")
LOSSES = {
    "linear_preference_loss": partial(linear_preference_loss, **general(CPU)),
    "linear_preference_loss, small budget": partial(linear_preference_loss, budget_bytes=SMALL_BUDGET, **general(CPU)),
    "linear_wrpo_loss": partial(linear_wrpo_loss, alpha=0.3),
    "linear_dpo_loss": linear_dpo_loss,
    "linear_ipo_loss": linear_ipo_loss,
    "linear_simpo_loss": lambda h, w, y, r, **options: linear_simpo_loss(h, w, y, **options),
}


def moved(labels: torch.Tensor, by: int) -> torch.Tensor:
    """A label at a time: the meaning of `shift`, written apart."""
    rows = [[*row[by:], *[-100] * min(by, len(row))] for row in labels.tolist()]
    return torch.tensor(rows)


@pytest.mark.parametrize("shift", [True, 1, 2, T, T + 3])
def test_a_shifted_log_prob_is_that_of_the_later_label(shift):
    hidden, weight, bias, labels, _ = tensors(CPU, torch.float64)
    logp = linear_token_logp(hidden, weight, labels, bias=bias, shift=shift)
    truth = oracle.pick(hidden @ weight.T + bias, moved(labels, int(shift)), -100)
    torch.testing.assert_close(logp, truth, rtol=1e-12, atol=0)
    got, expected = (torch.autograd.grad(y.square().sum(), [hidden, weight], allow_unused=True) for y in (logp, truth))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("door", LOSSES)
@pytest.mark.parametrize("shift", [True, 2])
def test_a_shifted_loss_is_that_of_labels_moved_by_hand(door, shift):
    hidden, weight, bias, labels, ref = tensors(CPU, torch.float64)
    got = LOSSES[door](hidden, weight, labels, ref, bias=bias, shift=shift)
    expected = LOSSES[door](hidden[:, :-shift], weight, labels[:, shift:], ref, bias=bias)
    torch.testing.assert_close(got.logp, oracle.pick(hidden @ weight.T + bias, moved(labels, shift), -100).sum(1))
    grads = [torch.autograd.grad(out.loss, [hidden, weight, bias]) for out in (got, expected)]
    torch.testing.assert_close((got.loss, *grads[0]), (expected.loss, *grads[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bounds", [[0, 5, 10, 15, 20, 25, 30], [0, 1, 1, 9, 9, 30, 30]], ids=["even", "uneven"])
def test_a_packed_sequence_never_predicts_the_first_label_of_the_next(bounds):
    hidden, weight, _, labels, ref = tensors(CPU, torch.float64)
    hidden, labels, ends = hidden.detach().flatten(0, 1), labels.flatten(), torch.tensor(bounds)
    by_hand = torch.cat([moved(part[None], 1)[0] for part in labels.split(ends.diff().tolist())]).long()
    got, expected = (
        linear_preference_loss(hidden, weight, y, ref, cu_seqlens=ends.int(), shift=shift, empty="zero", **general(CPU))
        for y, shift in ((labels, True), (by_hand, False))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_wrong_label_is_reported_where_the_caller_wrote_it():
    hidden, weight, _, labels, ref = tensors(CPU)
    labels[1, 2] = 99
    with pytest.raises(ValueError, match=rf"labels\[{T + 2}\].*99"):
        linear_dpo_loss(hidden, weight, labels, ref, shift=True)
    with pytest.raises(ValueError, match=rf"target\[{T + 2}\].*99"):
        linear_token_logp(hidden, weight, labels, shift=True)


def test_num_rows_counts_what_the_shift_leaves():
    hidden, weight, _, labels, _ = tensors(CPU)
    labels[:, 0] = 3  # its label is lost
    number = int((labels[:, 1:] != -100).sum())
    same = linear_token_logp(hidden, weight, labels, shift=True, num_rows=number)
    oracle.assert_same_bits("logp", same, linear_token_logp(hidden, weight, labels, shift=True))
    with pytest.raises(ValueError, match=f"num_rows.*{number}.*{number + S}"):
        linear_token_logp(hidden, weight, labels, shift=True, num_rows=number + S)


def test_compiled_calls_shift_too():
    hidden, weight, _, labels, _ = tensors(CPU)
    compiled = torch.compile(linear_token_logp, fullgraph=True, backend="aot_eager")
    oracle.assert_same_bits(
        "logp", compiled(hidden, weight, labels, shift=True), linear_token_logp(hidden, weight, labels, shift=True)
    )


@pytest.mark.parametrize(
    ("shift", "error", "message"),
    [(-1, ValueError, "shift.*-1"), (0.5, TypeError, "shift.*float"), ("yes", TypeError, "shift.*str")],
)
def test_a_shift_that_is_none_is_named(shift, error, message):
    hidden, weight, _, labels, _ = tensors(CPU)
    with pytest.raises(error, match=message):
        linear_token_logp(hidden, weight, labels, shift=shift)


def test_labels_of_32_bits_and_numbers_of_numpy_are_taken_for_what_they_are():
    np = pytest.importorskip("numpy", reason="torch may be installed without it")
    hidden, weight, _, labels, ref = tensors(CPU)
    numbers = {"temperature": np.float32(0.5), "softcap": np.float64(20), "ignore_index": np.int64(-100)}
    plain = {"temperature": 0.5, "softcap": 20.0}
    got = linear_dpo_loss(
        hidden, weight, labels.int(), ref, beta=np.float32(0.5), budget_bytes=np.int32(1 << 20), **numbers
    )
    expected = linear_dpo_loss(hidden, weight, labels, ref, beta=0.5, budget_bytes=1 << 20, **plain)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        oracle.assert_same_bits(name, a, b)
