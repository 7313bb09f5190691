"""Errors planted between the caller and the ops, each as a kernel could make it; `fuzz` must see them all.

python tests/kernels/planted.py [--cases 300] [--seed 1]        how soon, and in how many cases
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fuzz import OPS, Wrong, backends_here, run_case
from torch import Tensor

ARGUMENTS = {
    "token_logp": ("logits", "target"),
    "linear_token_logp": ("hidden", "weight", "target"),
    "linear_token_statistics": ("hidden", "weight", "target"),
    "preference_loss": ("logp", "ref_logp"),
    "linear_preference_loss": ("hidden", "weight", "target", "ref_logp"),
    "linear_nll_loss": ("hidden", "weight", "target"),
    "wrpo_loss": ("logp", "ref_logp"),
    "linear_wrpo_loss": ("hidden", "weight", "target", "ref_logp"),
}
Inputs = dict[str, Any]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def gradient(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], None]:
    def plant(inputs: Inputs) -> None:
        if inputs.get(name) is not None:
            inputs[name] = _WrongGradient.apply(inputs[name], change)

    return plant


def option(name: str, change: Callable[[Any], Any]) -> Callable[[Inputs], None]:
    def plant(inputs: Inputs) -> None:
        if inputs.get(name) is not None:
            inputs[name] = change(inputs[name])

    return plant


def next_label(inputs: Inputs) -> None:
    if "target" in inputs:
        target, columns = inputs["target"], inputs["logits" if "logits" in inputs else "weight"]
        vocabulary = columns.shape[-1] if "logits" in inputs else columns.shape[0]
        moved = (target + 1) % vocabulary
        stays = (target == inputs["ignore_index"]) | (moved == inputs["ignore_index"])
        inputs["target"] = target.where(stays, moved)


def no_length_of_the_reference(inputs: Inputs) -> None:
    if inputs.get("length_normalize") and inputs.get("length") is not None and inputs["ref_logp"] is not None:
        inputs["ref_logp"] = inputs["ref_logp"] * inputs["length"]


def divided_by_the_sequences(inputs: Inputs) -> None:
    if inputs.get("reduction") == "mean" and inputs["normalizer"] is None:
        inputs["normalizer"] = float(len(inputs["group"])) if "group" in inputs else 1.0


def last_row_lost(grad: Tensor) -> Tensor:
    return torch.cat([grad[:-1], torch.zeros_like(grad[-1:])]) if grad.dim() > 1 else grad


PLANTED: dict[str, Callable[[Inputs], None]] = {
    "the sign of the margin": option("seq_weight", torch.neg),
    "the label one too far": next_label,
    "beta left out": option("beta", lambda beta: 1.0),
    "a mean over sequences": divided_by_the_sequences,
    "the bias dropped": option("bias", lambda bias: 0 * bias),
    "the softcap dropped": option("softcap", lambda cap: None),
    "the temperature squared": option("temperature", lambda temperature: temperature**2),
    "the scale without its sign": option("logit_scale", abs),
    "the adapter at half its strength": option("adapter", lambda adapter: (0.5 * adapter[0], adapter[1])),
    "the reference dropped": option("ref_logp", lambda ref: None),
    "the reference's length": no_length_of_the_reference,
    "gamma added": option("gamma", lambda gamma: -gamma),
    "half the smoothing": option("label_smoothing", lambda eps: eps / 2),
    "the weight of a group as its size": option("group_weight", torch.abs),
    "the likelihood's weight doubled": option("nll_weight", lambda weight: 2 * weight),
    "alpha and 1 - alpha": option("alpha", lambda alpha: 1 - alpha if not isinstance(alpha, Tensor) else alpha / 2),
    "dW 0.05 % too large": gradient("weight", lambda grad: 1.0005 * grad),
    "dh without its last row": gradient("hidden", last_row_lost),
    "db of the wrong sign": gradient("bias", torch.neg),
    "dlogits 0.01 % too small": gradient("logits", lambda grad: 0.9999 * grad),
}


def with_error(plant: Callable[[Inputs], None]) -> SimpleNamespace:
    """The ops with an error."""

    def planted(name: str) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            inputs = dict(zip(ARGUMENTS[name], arguments, strict=True)) | options
            plant(inputs)
            positional = [inputs.pop(argument) for argument in ARGUMENTS[name]]
            return getattr(OPS, name)(*positional, **inputs)

        return call

    return SimpleNamespace(**{name: planted(name) for name in ARGUMENTS})


def first_seen(name: str, seed: int, cases: int) -> int | None:
    """The first case of the seed in which an error shows."""
    ops, backends = with_error(PLANTED[name]), backends_here()
    for case in range(cases):
        try:
            run_case(seed, case, ops, backends)
        except Wrong:
            return case
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    backends = backends_here()
    for name, plant in PLANTED.items():
        ops, seen = with_error(plant), []
        for case in range(options.cases):
            try:
                run_case(options.seed, case, ops, backends)
            except Wrong:
                seen.append(case)
        print(f"{name:<36} first {seen[0] if seen else 'never':>5}, in {len(seen):>4} of {options.cases}")


if __name__ == "__main__":
    main()
