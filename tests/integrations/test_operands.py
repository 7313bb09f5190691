"""Tensors of the wrong kind in the calls of other libraries: named as they are there, with what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wrpo_kernels.integrations import cce, liger, pytorch
from wrpo_kernels.integrations.operands import as_linear_takes_it

S, T, D, V = 2, 3, 4, 7
IS_CHOSEN = torch.tensor([True, False])


def of_pairs(name: str, **options: Any) -> Callable[..., Any]:
    def call(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
        return getattr(liger, name)(**options)(weight, hidden, labels, bias)

    return call


def kto(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
    return liger.LigerFusedLinearKTOLoss()(hidden, weight, labels, bias, IS_CHOSEN)


def of_torch(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
    return pytorch.linear_cross_entropy(hidden, weight, labels, linear_bias=bias)


def reference_of_dpo(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
    given = (torch.ones(V, D), torch.ones(S, T, D), labels)
    return liger.LigerFusedLinearDPOLoss()(*given, ref_input=hidden, ref_weight=weight, ref_bias=bias)


LIGER = ("_input", "lin_weight", "target", "bias")
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, str, str, str]]] = {
    "Liger, DPO": (of_pairs("LigerFusedLinearDPOLoss", use_ref_model=False), LIGER),
    "Liger, CPO": (of_pairs("LigerFusedLinearCPOLoss"), LIGER),
    "Liger, SimPO": (of_pairs("LigerFusedLinearSimPOLoss"), LIGER),
    "Liger, ORPO": (of_pairs("LigerFusedLinearORPOLoss"), LIGER),
    "Liger, KTO": (kto, LIGER),
    "Liger, cross entropy": (of_pairs("LigerFusedLinearCrossEntropyLoss"), LIGER),
    "Liger, reference of DPO": (reference_of_dpo, ("ref_input", "ref_weight", "target", "ref_bias")),
    "CCE": (lambda *x: cce.linear_cross_entropy(*x[:3], bias=x[3]), ("e", "c", "targets", "bias")),
    "CCE, with lse": (
        lambda *x: cce.linear_cross_entropy(*x[:3], bias=x[3], return_lse=True),
        ("e", "c", "targets", "bias"),
    ),
    "torch": (of_torch, ("input", "linear_weight", "target", "linear_bias")),
}
# place of the argument: what comes in its place, and what the error says of it
WRONG: tuple[tuple[int, Any, str], ...] = (
    (0, None, "must be a torch.Tensor, got NoneType"),
    (0, torch.ones(S, T, D, dtype=torch.int64), "must be float32, bfloat16, float16 or float64, got torch.int64"),
    (0, torch.ones(S, T, D + 1), r"must be \[\.\.\., D=4\].*got \[2, 3, 5\]"),
    (1, None, "must be a torch.Tensor, got NoneType"),
    (1, torch.ones(V, D, dtype=torch.bool), "must be float32, bfloat16, float16 or float64, got torch.bool"),
    (1, torch.ones(D), r"must be \[V, D\].*got \[4\]"),
    (2, None, "must be a torch.Tensor, got NoneType"),
    (2, [[1, 2, 3]] * S, "must be a torch.Tensor, got list"),
    (2, torch.ones(S, T, dtype=torch.bool), "must be int64, got torch.bool"),
    (2, torch.ones(S, T + 1, dtype=torch.int64), r"must be .* = \[2, 3\], got \[2, 4\]"),
    (3, 1.0, "must be a torch.Tensor, got float"),
    (3, torch.ones(V, dtype=torch.int64), "must be float32, bfloat16, float16 or float64, got torch.int64"),
    (3, torch.ones(V + 1), r"must be \[V\] = \[7\], got \[8\]"),
)


def operands() -> list[Any]:
    return [torch.ones(S, T, D), torch.ones(V, D), torch.ones(S, T, dtype=torch.int64), torch.ones(V)]


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_of_the_wrong_kind_is_named_as_its_library_names_it(name):
    call, names = CALLS[name]
    call(*operands())
    for place, value, message in WRONG:
        if value is None and names[place].startswith("ref_"):
            continue  # "must be given", with a test of its own
        given = operands()
        given[place] = value
        for is_autocast in (False, True):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
                pytest.raises((TypeError, ValueError), match=f"^{names[place]} {message}"),
            ):
                call(*given)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "torch"])
def test_labels_of_floats_are_named(name):
    call, names = CALLS[name]
    with pytest.raises(ValueError, match=f"^{names[2]} must be int64, got torch.float32"):
        call(*operands()[:2], torch.ones(S, T), None)


def nll_of_orpo(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
    return liger.LigerFusedLinearORPOLoss()(weight, hidden, torch.ones(S, T).long(), bias, labels)


@pytest.mark.parametrize("value", [V, -1])
@pytest.mark.parametrize("name", [*CALLS, "Liger, labels of ORPO's likelihood"])
def test_a_label_out_of_range_is_named_as_its_library_names_it(name, value):
    call, names = CALLS.get(name, (nll_of_orpo, ("_input", "lin_weight", "nll_target", "bias")))
    given = operands()
    given[2][1, 0] = value
    with pytest.raises(ValueError, match=rf"^{names[2]}\[3\] .*V={V}\) or ignore_index=-100, got {value}"):
        call(*given)


def class_weights(value: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    module = liger.LigerFusedLinearCrossEntropyLoss(ce_weight=value)
    return [
        ("ce_weight", lambda h, w, y: module(w, h, y)),
        ("weight", lambda h, w, y: pytorch.linear_cross_entropy(h, w, y, weight=value)),
    ]


@pytest.mark.parametrize(
    ("value", "message"), [(torch.ones(V + 1), r"\[V\] = \[7\], got \[8\]"), (torch.ones(V).long(), "got torch.int64")]
)
def test_class_weights_are_named_as_their_library_names_them(value, message):
    for name, call in class_weights(value):
        with pytest.raises(ValueError, match=f"^{name} must be .*{message}"):
            call(*operands()[:3])


def test_float64_stays_itself_under_autocast_as_in_a_linear_layer():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float64, torch.float32):
            x = torch.ones(2, 2, dtype=dtype)
            assert as_linear_takes_it(x).dtype == F.linear(x, x).dtype
