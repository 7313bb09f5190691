"""The short way of a bare head gives what the long one gives, and is taken where nothing else is asked for."""

from __future__ import annotations

import oracle
import pytest
import torch
from uneven_batch import HEADS, Batch, run

from wrpo_kernels.linear_preference_loss import at_once

pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built here")
VOCABULARY, WIDTH = HEADS["small head"]


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether it was taken, of each call."""
    answers: list[bool] = []
    takes = at_once.takes

    def spy(tensors, options) -> bool:
        answers.append(takes(tensors, options))
        return answers[-1]

    monkeypatch.setattr(at_once, "takes", spy)
    return answers


def batch_of(dtype: torch.dtype, is_padded: bool = True) -> Batch:
    batch = Batch((VOCABULARY, WIDTH), dtype, torch.device("cpu"))
    if not is_padded:
        batch.hidden = torch.randn(8, 5, WIDTH).to(dtype)
        batch.labels = torch.randint(0, VOCABULARY, (8, 5))
    return batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "hidden weight"])
@pytest.mark.parametrize("is_padded", [True, False], ids=["prompts", "all rows"])
def test_the_short_way_gives_the_values_of_the_long_one_and_its_gradients_but_for_rounding(
    dtype, wanted, is_padded, taken, monkeypatch
):
    batch, asked = batch_of(dtype, is_padded), set(wanted.split())
    options = batch.options | {"beta": 0.1, "softcap": 5.0}
    short, short_grads = run(batch, batch.tensors(bias=False), asked, 0.7, **options)
    assert taken == [True]
    monkeypatch.setattr(at_once, "takes", lambda *_: False)
    long, long_grads = run(batch, batch.tensors(bias=False), asked, 0.7, **options)
    for name in ("loss", "logp", "reward", "margin"):
        oracle.assert_same_bits(name, getattr(short, name), getattr(long, name))
    assert set(short_grads) == asked
    for name, grad in short_grads.items():
        assert grad.is_contiguous()
        expected = long_grads[name].double()
        difference = (grad.double() - expected).square().mean().sqrt()
        assert difference <= 4 * torch.finfo(dtype).eps * expected.square().mean().sqrt(), name


@pytest.mark.parametrize(
    "more",
    [{"grad_filter": 1e-4}, {"backend": "reference"}, {"logits_dtype": torch.float32}],
    ids=lambda x: next(iter(x)),
)
def test_the_short_way_leaves_what_it_has_not_to_the_long_one(more, taken):
    batch = batch_of(torch.bfloat16)
    run(batch, batch.tensors(bias=False), {"hidden", "weight"}, **batch.options, beta=0.1, **more)
    run(batch, batch.tensors(bias=True), {"hidden", "weight"}, **batch.options, beta=0.1)
    wide = batch.tensors(bias=False) | {"weight": batch.weight.float()}
    run(batch, wide, {"hidden", "weight"}, **batch.options, beta=0.1)
    assert taken == [False, False, False]


def test_the_short_way_takes_a_weight_of_any_strides(taken):
    batch = batch_of(torch.float32)
    given = batch.tensors(bias=False)
    turned = given | {"weight": given["weight"].t().contiguous().t()}
    (one, grads), (other, of_turned) = (
        run(batch, some, {"hidden", "weight"}, **batch.options, beta=0.1) for some in (given, turned)
    )
    assert taken == [True, True]
    torch.testing.assert_close(one.loss, other.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(of_turned[name], grad)
