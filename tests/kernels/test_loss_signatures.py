"""The losses by name are doors to the general forms: each shows every option, and hands each on under its own name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import pytest
import torch

from wrpo_kernels import (
    dpo_loss,
    ipo_loss,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_preference_loss,
    linear_simpo_loss,
    linear_wrpo_loss,
    preference_loss,
    simpo_loss,
    wrpo_loss,
)

# What the layout or the name of a loss settles, and so is no option of it.
LAYOUT = {"seq_weight", "group", "num_groups"}
LOSS = {"loss_type", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"}
SETTLED = {
    wrpo_loss: LAYOUT,
    linear_wrpo_loss: LAYOUT,
    dpo_loss: LAYOUT | {"length"},
    linear_dpo_loss: LAYOUT,
    ipo_loss: LAYOUT | LOSS | {"length", "gamma", "label_smoothing"},
    linear_ipo_loss: LAYOUT | LOSS | {"gamma", "label_smoothing"},
    simpo_loss: LAYOUT | LOSS | {"length", "length_normalize"},
    linear_simpo_loss: LAYOUT | LOSS | {"length_normalize"},
}
OWN_OPTIONS = {"alpha", "num_sources", "chosen_length", "rejected_length"}
OWN_DEFAULTS = {"beta", "gamma"}


def options_of(door: Callable) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(door).parameters.items() if p.kind is p.KEYWORD_ONLY}


def general_form(door: Callable) -> Callable:
    return linear_preference_loss if door.__name__.startswith("linear_") else preference_loss


@pytest.mark.parametrize("door", SETTLED)
def test_every_option_of_the_general_form_stands_in_the_signature(door):
    own, general = options_of(door), options_of(general_form(door))
    assert set(general) - SETTLED[door] == set(own) - OWN_OPTIONS
    for name in set(own) & set(general) - OWN_DEFAULTS:
        assert own[name].default == general[name].default, name
        assert own[name].annotation == general[name].annotation, name


@pytest.mark.parametrize("door", SETTLED)
def test_every_option_reaches_the_general_form_under_its_own_name(door, monkeypatch):
    general = general_form(door)
    monkeypatch.setattr(sys.modules[door.__module__], general.__name__, lambda *tensors, **options: options)
    zeros, lengths = torch.zeros(10), {"chosen_length": torch.ones(10).long(), "rejected_length": torch.ones(10).long()}
    tensors = {wrpo_loss: [zeros], simpo_loss: [zeros, zeros, *lengths.values()]}.get(door, [zeros, zeros])
    if general is linear_preference_loss:
        tensors = [torch.zeros(30, 4), torch.zeros(5, 4), torch.zeros(30).long()]
    # What the layouts read; what they only hand on may be anything.
    read = {"alpha": 0.1, "num_sources": 3, "nll_weight": 0.5, "length_normalize": True, **lengths}
    bounds = {"cu_seqlens": torch.arange(0, 31, 3)}
    given = {name: (read | bounds).get(name, object()) for name in options_of(door)}
    handed_on = door(*tensors, **given)
    for name in given.keys() - read.keys():
        assert handed_on[name] is given[name], name
    if door in (wrpo_loss, linear_wrpo_loss):
        assert handed_on["nll_weight"] == read["nll_weight"]
