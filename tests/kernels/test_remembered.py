"""What is remembered of a call: nothing but what its kind settles, and no error."""

from __future__ import annotations

import pytest
import torch

from wrpo_kernels import linear_token_logp, preference_loss
from wrpo_kernels.remembered import MOST_KEPT, remembered

PAIR = {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.tensor([0, 0]), "num_groups": 1}


@pytest.fixture
def counted():
    """A remembered function, and how often it was called."""
    calls = []

    @remembered
    def function(*arguments):
        calls.append(arguments)
        if "wrong" in arguments:
            raise ValueError("wrong")
        return len(calls)

    return function, calls


def test_the_same_kind_is_looked_at_once_and_another_again(counted):
    function, calls = counted
    x = torch.randn(3, 4)
    kinds = [
        (x, 1.0),
        (x, 1),
        (x, True),
        (x, None),
        (x, "1"),
        (x[:2], 1.0),
        (x.double(), 1.0),
        (x.clone().requires_grad_(), 1.0),
        (torch.nn.Parameter(x), 1.0),
        (x.to("meta"), 1.0),
        (x.to_sparse(), 1.0),
    ]
    for number, kind in enumerate(kinds, start=1):
        assert function(*kind) == function(*kind) == number
    assert function(torch.randn(3, 4), 1.0) == 1
    assert len(calls) == len(kinds)


def test_what_it_raises_is_raised_each_time(counted):
    function, calls = counted
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            function("wrong")
    assert len(calls) == 2


def test_what_is_no_plain_option_or_tensor_is_looked_at_each_time(counted):
    function, calls = counted

    class Own(torch.Tensor):
        pass

    nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])
    odd = ([1.0], (1.0,), torch.randn(2).as_subclass(Own), nested)
    for value in odd:
        assert function(value) != function(value)
    assert len(calls) == 2 * len(odd)


def test_no_more_is_kept_than_it_says(counted):
    function, calls = counted
    for number in range(MOST_KEPT + 1):
        function(number)
    function(MOST_KEPT)
    function(0)
    assert len(calls) == MOST_KEPT + 2


def test_a_wrong_option_after_a_right_one_that_is_equal_raises():
    logp, right = torch.randn(2), preference_loss(torch.zeros(2), beta=1.0, label_smoothing=0.0, **PAIR)
    assert right.loss.isfinite()
    for wrong in ({"beta": True}, {"beta": 1.0, "label_smoothing": False}, {"beta": 1.0, "nll_weight": False}):
        for _ in range(2):
            with pytest.raises(TypeError, match="must be a number, got bool"):
                preference_loss(logp, **wrong, **PAIR)
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    assert linear_token_logp(hidden, weight, target, temperature=1.0).isfinite().all()
    with pytest.raises(TypeError, match="temperature must be a number, got bool"):
        linear_token_logp(hidden, weight, target, temperature=True)
