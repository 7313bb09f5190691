"""Large buffers are used again, and never while anything still reads them."""

from __future__ import annotations

import gc
from collections import deque

import pytest
import torch
from tiny_runs import wrpo_trainer
from transformers import TrainerCallback

from wrpo_kernels import linear_token_logp
from wrpo_kernels.lm_head import scratch as scratch_module
from wrpo_kernels.lm_head.scratch import LARGE, none_kept, scratch

CPU, SIDE = torch.device("cpu"), 2 * LARGE // 4 // 1024  # [SIDE, 1024] float32 is twice the size from which it matters


@pytest.fixture(autouse=True)
def no_buffers_of_other_tests(monkeypatch):
    monkeypatch.setattr(scratch_module, "_kept", deque(maxlen=2))


def large() -> torch.Tensor:
    return scratch(SIDE, 1024, torch.float32, CPU)


def test_a_large_buffer_that_was_let_go_is_the_next_one():
    buffer = large()
    address = buffer.data_ptr()
    del buffer
    assert large().data_ptr() == address


def test_two_buffers_are_kept_whichever_is_let_go_first():
    first, second = large(), large()
    addresses = {first.data_ptr(), second.data_ptr()}
    del first, second
    first, second = large(), large()
    assert {first.data_ptr(), second.data_ptr()} == addresses


def test_where_none_is_to_be_kept_none_is_and_afterwards_they_are_again():
    outer = large()
    del outer
    assert len(scratch_module._kept) == 1
    with none_kept():
        inner = large()
        del inner
        assert not scratch_module._kept
    buffer = large()
    del buffer
    assert len(scratch_module._kept) == 1


def test_training_keeps_none_between_its_steps(tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.kept = []

        def on_step_end(self, *_args, **_options):
            buffer = large()
            del buffer
            self.kept.append(len(scratch_module._kept))

    trainer = wrpo_trainer(tmp_path, max_steps=2)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert watch.kept == [0, 0]


def test_a_view_keeps_its_buffer():
    buffer = large()
    row = buffer.fill_(1.0)[3]
    del buffer
    gc.collect()
    large().fill_(2.0)
    assert (row == 1).all()


def test_a_small_buffer_is_ordinary_memory():
    assert scratch(4, 4, torch.float32, CPU).untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_keeps_its_values_while_later_steps_run(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(SIDE, 1024) * 0.02).to(dtype).requires_grad_()
    hidden, target = torch.randn(4, 1024, dtype=dtype), torch.randint(0, SIDE, (4,))
    (kept,) = torch.autograd.grad(linear_token_logp(hidden, weight, target).sum(), weight)
    before = kept.clone()
    for _ in range(3):
        torch.autograd.grad(linear_token_logp(2 * hidden, weight, target).sum(), weight)
    assert torch.equal(kept, before)


def test_gradients_of_several_micro_batches_add_up_in_place():
    torch.manual_seed(0)
    weight = (torch.randn(SIDE, 1024) * 0.02).requires_grad_()
    hidden, target = torch.randn(4, 1024), torch.randint(0, SIDE, (4,))
    (once,) = torch.autograd.grad(linear_token_logp(hidden, weight, target).sum(), weight)
    for _ in range(2):
        linear_token_logp(hidden, weight, target).sum().backward()
    assert torch.equal(weight.grad, 2 * once)
