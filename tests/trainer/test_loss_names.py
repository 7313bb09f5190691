"""What the settings take for a loss is what its kernel takes: the rest is refused before training, and no more."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from wrpo.training.loss_names import REFERENCE_FREE, LossName, check_losses, losses_of
from wrpo_kernels import preference_loss

PLAIN = {"gamma": 0.0, "smoothing": 0.0, "divergence": "reverse_kl"}
SETTINGS = [{"gamma": 0.5}, {"smoothing": 0.1}, {"smoothing": 0.0}, {"divergence": "forward_kl"}]


def does_kernel_take(name: str, gamma: float, smoothing: float, divergence: str) -> bool:
    sequences = {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.tensor([0, 0]), "length": torch.tensor([2, 3])}
    logp = torch.tensor([-1.0, -2.0])
    ref_logp = None if name in REFERENCE_FREE else logp
    options = {"gamma": gamma, "label_smoothing": smoothing, "f_divergence_type": divergence}
    try:
        preference_loss(logp, ref_logp=ref_logp, loss_type=losses_of(name), beta=0.1, **sequences, **options)
    except ValueError:
        return False
    return True


def do_settings_take(name: str, gamma: float, smoothing: float, divergence: str) -> bool:
    try:
        check_losses(name, None, gamma, smoothing, divergence, "auto")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", get_args(LossName))
def test_the_settings_take_for_a_loss_what_the_kernel_takes(name, setting):
    settings = PLAIN | {"smoothing": 0.1 * (name == "exo_pair")} | setting
    assert do_settings_take(name, **settings) == does_kernel_take(name, **settings)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_each_setting_is_taken_for_some_losses_and_refused_for_others(setting):
    assert {does_kernel_take(name, **PLAIN | setting) for name in get_args(LossName)} == {True, False}
