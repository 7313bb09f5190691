"""`lengths`: what the host knows of the labels. Nothing is then read from an accelerator, and wrong ones are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from uneven_batch import HEADS, Batch

from wrpo_kernels import linear_dpo_loss, linear_preference_loss, linear_wrpo_loss

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> Batch:
    return Batch(HEADS["small head"], torch.float32, CPU)


def loss(batch: Batch, **options) -> Tensor:
    tensors = batch.tensors()
    given = batch.options | {"beta": 0.1} | options
    return linear_preference_loss(tensors["hidden"], tensors["weight"], batch.labels, batch.ref_logp, **given).loss


def lengths_of(batch: Batch) -> list[int]:
    return (batch.labels != -100).sum(1).tolist()


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_lengths_that_are_right_change_nothing(form, batch):
    assert torch.equal(loss(batch, lengths=form(lengths_of(batch))), loss(batch))


def test_wrong_lengths_are_named(batch):
    right = lengths_of(batch)
    wrong = {
        "how many labels of each sequence": [right[1], right[0], *right[2:]],
        r"\[S\]": right[:-1],
        "sum to at most": [10**6, *right[1:]],
        ">= 0": [-1, *right[1:]],
        "int32 or int64": torch.tensor(right).float(),
        "on the CPU": torch.empty(len(right), dtype=torch.int64, device="meta"),
    }
    assert right[0] != right[1]
    for words, lengths in wrong.items():
        with pytest.raises(ValueError, match=words):
            loss(batch, lengths=lengths)
    for lengths in (3, "3", [1.0] * len(right), [True] * len(right)):
        with pytest.raises(TypeError, match="lengths"):
            loss(batch, lengths=lengths)
    with pytest.raises(ValueError, match="num_rows must be the sum of lengths"):
        loss(batch, lengths=right, num_rows=sum(right) + 1)


def test_compiled_code_takes_other_lengths_without_compiling_again_and_makes_nan_of_wrong_ones():
    hidden, weight = torch.randn(6, 5, 8), torch.randn(23, 8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(labels: Tensor, lengths: Tensor) -> Tensor:
        return linear_wrpo_loss(hidden, weight, labels, alpha=0.3, lengths=lengths).loss

    for step in range(4):
        labels = torch.randint(0, 23, (6, 5))
        labels[step, : step + 1] = -100
        lengths = (labels != -100).sum(1)
        torch.testing.assert_close(compiled(labels, lengths), linear_wrpo_loss(hidden, weight, labels, alpha=0.3).loss)
        assert compiled(labels, lengths.roll(1)).isnan()
    assert counter.frame_count == 1


def test_the_doors_hand_lengths_on(batch):
    hidden, weight, labels = torch.randn(4, 5, 8), torch.randn(23, 8), torch.randint(0, 23, (4, 5))
    labels[1, 0] = -100
    assert torch.isfinite(linear_dpo_loss(hidden, weight, labels, lengths=[5, 4, 5, 5]).loss)
    with pytest.raises(ValueError, match="lengths"):
        linear_dpo_loss(hidden, weight, labels, lengths=[5, 5, 5, 4])
