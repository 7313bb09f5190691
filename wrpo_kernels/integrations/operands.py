"""The tensors of another library's call: checked under the names that they have there, and multiplied in the type in
which that library would."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import check_int, check_labels, int64_labels, is_readable
from wrpo_kernels.lm_head.inputs import check_tensors
from wrpo_kernels.logit_transform import check_bias

Names = tuple[str, str, str, str]  # what the caller calls hidden states, weight, labels and bias


def checked_operands(
    names: Names, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """`hidden` [..., D] as a linear layer takes it, and `labels` [...] in int64, of a head `weight` [V, D]. Values of
    labels are read where that waits for no device."""
    of_hidden, of_weight, of_labels, of_bias = names
    labels = int64_labels(of_labels, labels)
    check_tensors(hidden, weight, labels, (of_hidden, of_weight, of_labels))
    check_bias(of_bias, bias, hidden, weight.shape[0])
    check_int("ignore_index", ignore_index)
    if is_readable(labels):
        check_labels(of_labels, labels.reshape(-1), ignore_index, weight.shape[0])
    return as_linear_takes_it(hidden), labels


def as_linear_takes_it(hidden: Tensor) -> Tensor:
    """Hidden states in the type in which `F.linear` would multiply them under autocast; it leaves float64 as it is."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return hidden.to(torch.get_autocast_dtype(kind)) if is_cast else hidden
