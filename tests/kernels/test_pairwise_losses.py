"""DPO, IPO and SimPO of (chosen, rejected) pairs: the formulas of the papers in float64, in every door."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import oracle
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, logsigmoid

from wrpo_kernels import (
    dpo_loss,
    ipo_loss,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_preference_loss,
    linear_simpo_loss,
    simpo_loss,
)

B, T, D, V = 5, 7, 8, 23


class Pairs(NamedTuple):
    """What the responses of B pairs have, each [B]; the lengths are int64."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    weight: Tensor  # some option that differs from pair to pair

    def lead(self) -> Tensor:
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    def averaged_lead(self) -> Tensor:
        chosen = (self.chosen - self.ref_chosen) / self.chosen_length
        return chosen - (self.rejected - self.ref_rejected) / self.rejected_length

    def lengths(self) -> dict[str, Tensor]:
        return {"chosen_length": self.chosen_length, "rejected_length": self.rejected_length}


def pairs(device: torch.device, count: int = B) -> Pairs:
    chosen, rejected = (-300 * torch.rand(count, device=device) - 1 for _ in range(2))
    ref_chosen, ref_rejected = (x + 20 * torch.randn(count, device=device) for x in (chosen, rejected))
    lengths = (torch.randint(1, 400, (count,), device=device) for _ in range(2))
    weight = torch.arange(count, device=device) / 4  # exact in float32, as are all options below but beta
    return Pairs(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected, *lengths, weight)


def tensors_of(door: Callable, x: Pairs) -> tuple[Tensor, ...]:
    logp = (x.chosen, x.rejected)  # by name: the compiler of torch 2.8 cuts no part out of a named tuple with methods
    return (*logp, *x.lengths().values()) if door is simpo_loss else (*logp, x.ref_chosen, x.ref_rejected)


def call(door: Callable, x: Pairs, **options) -> Tensor:
    return door(*tensors_of(door, x), **options).loss


def smoothed(m: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * logsigmoid(m) - eps * logsigmoid(-m)


class Case(NamedTuple):
    door: Callable
    options: Callable[[Pairs], dict]
    truth: Callable[[Pairs], Tensor]  # the formula as the papers have it


CASES = {
    "DPO": Case(dpo_loss, lambda x: {}, lambda x: -logsigmoid(0.1 * x.lead()).mean()),
    "DPO with a margin, flipped labels and weights of pairs": Case(
        dpo_loss,
        lambda x: {"beta": 0.05, "gamma": 0.75, "label_smoothing": 0.25, "group_weight": x.weight, "reduction": "sum"},
        lambda x: (x.weight * smoothed(0.05 * x.lead() - 0.75, 0.25)).sum(),
    ),
    "DPO of averages": Case(
        dpo_loss,
        lambda x: {"beta": 5.0, "length_normalize": True, **x.lengths()},
        lambda x: -logsigmoid(5 * x.averaged_lead()).mean(),
    ),
    "DPO and the likelihood of the chosen": Case(
        dpo_loss,
        lambda x: {"nll_weight": 0.25},
        lambda x: (-logsigmoid(0.1 * x.lead()) - 0.25 * x.chosen).mean(),
    ),
    "DPO and the likelihood of the chosen, with a weight for each pair": Case(
        dpo_loss,
        lambda x: {"nll_weight": x.weight, "normalizer": 7},
        lambda x: (-logsigmoid(0.1 * x.lead()) - x.weight * x.chosen).sum() / 7,
    ),
    "IPO": Case(ipo_loss, lambda x: {}, lambda x: (x.lead() - 1 / (2 * 0.1)).square().mean()),
    "IPO of averages, as TRL has it": Case(
        ipo_loss,
        lambda x: {"beta": 0.5, "length_normalize": True, **x.lengths()},
        lambda x: (x.averaged_lead() - 1 / (2 * 0.5)).square().mean(),
    ),
    "SimPO": Case(
        simpo_loss,
        lambda x: {},
        lambda x: -logsigmoid(2 / x.chosen_length * x.chosen - 2 / x.rejected_length * x.rejected - 0.5).mean(),
    ),
    "SimPO as TRL writes it, and the likelihood of the chosen": Case(
        simpo_loss,
        lambda x: {"beta": 10.0, "gamma": 1.5, "label_smoothing": 0.125, "nll_weight": 0.5},
        lambda x: (
            smoothed(10 * (x.chosen / x.chosen_length - x.rejected / x.rejected_length - 1.5 / 10), 0.125)
            - 0.5 * x.chosen / x.chosen_length
        ).mean(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_of_pairs_is_the_formula_of_its_paper(name, backend, device):
    """Value (a mean over B in float32, of results rounded once) and both gradients."""
    door, options, formula = CASES[name]
    x = pairs(device)
    exact = Pairs(*(y.detach().double().requires_grad_(y.requires_grad) for y in x))
    loss, truth = call(door, x, backend=backend, **options(x)), formula(exact)
    value = truth.detach()
    oracle.assert_rule("loss", loss, value, value, 4 * oracle.ulp(value, torch.float32))
    got, expected = (torch.autograd.grad(y, z[:2]) for y, z in ((loss, x), (truth, exact)))
    for side, grad, true in zip(("chosen", "rejected"), got, expected, strict=True):
        oracle.assert_rule(f"grad_{side}", grad, true, true, 3 * oracle.ulp(true, torch.float32))


@pytest.mark.parametrize("door", [dpo_loss, ipo_loss])
def test_without_reference_log_probs_the_loss_is_reference_free(door, backend, device):
    x = pairs(device)
    zero = torch.zeros(B, device=device)
    free = door(x.chosen, x.rejected, backend=backend)
    oracle.assert_same_bits("loss", free.loss, door(x.chosen, x.rejected, zero, zero, backend=backend).loss)


def test_rewards_and_margins_are_chosen_before_rejected(backend, device):
    x = pairs(device)
    out = dpo_loss(*x[:4], beta=0.5, backend=backend)
    reward = 0.5 * torch.cat([x.chosen - x.ref_chosen, x.rejected - x.ref_rejected]).detach()
    torch.testing.assert_close(out.reward, reward)
    torch.testing.assert_close(out.margin, reward[:B] - reward[B:])
    oracle.assert_same_bits("logp", out.logp, torch.cat([x.chosen, x.rejected]).detach())


# The linear doors, and the same losses in the general form.
GENERAL = {
    linear_dpo_loss: {"beta": 0.1, "loss_type": "sigmoid"},
    linear_ipo_loss: {"beta": 0.1, "loss_type": "ipo"},
    linear_simpo_loss: {"beta": 2.0, "gamma": 0.5, "loss_type": "sigmoid", "length_normalize": True},
}
LINEAR = tuple(GENERAL)


def head(device: torch.device, dtype: torch.dtype = torch.float32, count: int = B, steps: int = T) -> tuple:
    """hidden, weight, labels and, where the method has them, reference log-probs of `count` pairs."""
    hidden = torch.randn(2 * count, steps, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2 * count, steps), device=device)
    labels[:, 0] = -100  # the prompt
    labels[0, 3:] = -100  # padding
    wide = torch.promote_types(dtype, torch.float32)
    return hidden, weight, labels, (-15 + torch.randn(2 * count, device=device)).to(wide)


def linear(door: Callable, hidden, weight, labels, ref_logp, **options):
    refs = () if door is linear_simpo_loss else (ref_logp,)
    return door(hidden, weight, labels, *refs, **options)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("door", LINEAR)
def test_a_linear_loss_of_pairs_is_the_general_form_with_weights_1_and_minus_1(door, layout, backend, device):
    """To the bit: values, log-probs, rewards, margins and gradients."""
    hidden, weight, labels, ref_logp = head(device)
    options = {"backend": backend, "softcap": 20.0, "nll_weight": 0.5}
    if layout == "packed":
        hidden, labels = hidden.detach().flatten(0, 1).requires_grad_(), labels.flatten()
        options["cu_seqlens"] = torch.arange(0, 2 * B * T + 1, T)
    got = linear(door, hidden, weight, labels, ref_logp, **options)
    expected = linear_preference_loss(
        hidden,
        weight,
        labels,
        None if door is linear_simpo_loss else ref_logp,
        seq_weight=torch.tensor([1.0] * B + [-1.0] * B, device=device),
        group=torch.arange(B, device=device).repeat(2),
        num_groups=B,
        **GENERAL[door],
        **(options | {"nll_weight": torch.tensor([0.5] * B + [0.0] * B, device=device)}),
    )
    for name, a, b in zip(got._fields, got, expected, strict=True):
        oracle.assert_same_bits(name, a, b)
    grads = [torch.autograd.grad(out.loss, [hidden, weight]) for out in (got, expected)]
    for name, a, b in zip(("hidden", "weight"), *grads, strict=True):
        oracle.assert_same_bits(f"grad_{name}", a, b)


FORMULAS = {
    linear_dpo_loss: CASES["DPO"].truth,
    linear_ipo_loss: CASES["IPO"].truth,
    linear_simpo_loss: CASES["SimPO"].truth,
}


@pytest.mark.parametrize("door", LINEAR)
def test_a_linear_loss_of_pairs_is_the_formula_on_whole_logits(door):
    """In float64, in which both are exact to its rounding; so are the gradients."""
    hidden, weight, labels, ref_logp = head(torch.device("cpu"), torch.float64)
    logp = oracle.pick(hidden @ weight.T, labels, -100).sum(1)
    lengths = (labels != -100).sum(1).double()
    x = Pairs(*logp.view(2, B), *ref_logp.view(2, B), *lengths.view(2, B), weight=logp)
    loss, truth = linear(door, hidden, weight, labels, ref_logp).loss, FORMULAS[door](x)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    got, expected = (torch.autograd.grad(y, [hidden, weight]) for y in (loss, truth))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_of_hugging_face_is_shifted_by_its_owner():
    """`hidden[:, :-1]` and `labels[:, 1:]` are what a causal language model's own loss compares."""
    hidden, weight, labels, ref_logp = head(torch.device("cpu"))
    out = linear_dpo_loss(hidden[:, :-1], weight, labels[:, 1:], ref_logp)
    scores = (hidden @ weight.T)[:, :-1].transpose(1, 2)
    nll = cross_entropy(scores, labels[:, 1:], ignore_index=-100, reduction="none").sum(1)
    torch.testing.assert_close(out.logp, -nll.detach())


REFUSED = {
    "chosen a list": ({"chosen_logp": [0.0, 0.0]}, TypeError, "chosen_logp.*list"),
    "no rejected": ({"rejected_logp": None}, TypeError, "rejected_logp.*NoneType"),
    "chosen a matrix": ({"chosen_logp": torch.zeros(2, 1)}, ValueError, r"chosen_logp.*\[B\].*\[2, 1\]"),
    "more chosen than rejected": ({"chosen_logp": torch.zeros(3)}, ValueError, r"rejected_logp.*\[3\].*\[2\]"),
    "more rejected than chosen": ({"rejected_logp": torch.zeros(3)}, ValueError, r"rejected_logp.*\[2\].*\[3\]"),
    "rejected of 16 bits": ({"rejected_logp": torch.zeros(2).bfloat16()}, ValueError, "rejected_logp.*bfloat16"),
    "half a reference": ({"ref_rejected_logp": None}, ValueError, "ref_chosen_logp and ref_rejected_logp.*both"),
    "a reference of another size": ({"ref_chosen_logp": torch.zeros(3)}, ValueError, r"ref_chosen_logp.*\[2\].*\[3\]"),
    "a reference of 16 bits": ({"ref_chosen_logp": torch.zeros(2).half()}, ValueError, "ref_chosen_logp.*float16"),
    "a reference that wants a gradient": (
        {"ref_rejected_logp": torch.zeros(2, requires_grad=True)},
        ValueError,
        "ref_rejected_logp.*requires grad",
    ),
    "lengths missing": ({"length_normalize": True}, ValueError, "chosen_length and rejected_length"),
    "half the lengths": (
        {"length_normalize": True, "chosen_length": torch.ones(2).long()},
        ValueError,
        "chosen_length and rejected_length.*both",
    ),
    "lengths as floats": (
        {"chosen_length": torch.ones(2), "rejected_length": torch.ones(2)},
        ValueError,
        "chosen_length.*int64.*float32",
    ),
    "an empty response": (
        {"chosen_length": torch.tensor([3, 4]), "rejected_length": torch.tensor([5, 0])},
        ValueError,
        "sequence 3 has no counted token",
    ),
    "beta 0": ({"beta": 0.0}, ValueError, "beta.*> 0"),
    "nll_weight below 0": ({"nll_weight": -0.1}, ValueError, "nll_weight.*>= 0.*-0.1"),
    "nll_weight as text": ({"nll_weight": "0.1"}, TypeError, "nll_weight.*str"),
    "nll_weight of every sequence": ({"nll_weight": torch.zeros(4)}, ValueError, r"nll_weight.*\[B\] = \[2\].*\[4\]"),
    "group_weight of every sequence": ({"group_weight": torch.zeros(4)}, ValueError, r"group_weight.*\[2\].*\[4\]"),
    "an option that does not exist": ({"betta": 0.1}, TypeError, "betta"),
}


@pytest.mark.parametrize("door", [dpo_loss, ipo_loss])
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name, door):
    changes, error, message = REFUSED[name]
    names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    with pytest.raises(error, match=f"(?s){message}"):
        door(**{**dict.fromkeys(names, torch.zeros(2)), **changes})


def test_simpo_wants_its_lengths():
    with pytest.raises(ValueError, match="chosen_length and rejected_length"):
        simpo_loss(torch.zeros(2), torch.zeros(2), None, None)


LINEAR_REFUSED = {
    "an odd number of sequences": (
        {"hidden": torch.zeros(5, 3, 4), "labels": torch.zeros(5, 3).long()},
        r"labels.*2 \* B.*chosen.*rejected.*5",
    ),
    "an odd number of packed sequences": (
        {
            "hidden": torch.zeros(9, 4),
            "labels": torch.zeros(9).long(),
            "cu_seqlens": torch.tensor([0, 3, 6, 9]),
        },
        r"cu_seqlens.*2 \* B.*chosen.*rejected.*3",
    ),
    "packed labels without bounds": (
        {"hidden": torch.zeros(12, 4), "labels": torch.zeros(12).long()},
        r"labels.*\[S, T\].*cu_seqlens.*\[12\]",
    ),
    "nll_weight of every sequence": ({"nll_weight": torch.zeros(4)}, r"nll_weight.*\[B\] = \[2\].*\[4\]"),
    "a label that does not exist": ({"labels": torch.full((4, 3), 5)}, r"labels\[0\].*V=5"),
}


@pytest.mark.parametrize("door", LINEAR)
@pytest.mark.parametrize("name", LINEAR_REFUSED)
def test_a_wrong_argument_of_a_linear_loss_is_named_in_the_error(name, door):
    changes, message = LINEAR_REFUSED[name]
    given = {"hidden": torch.zeros(4, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(4, 3).long()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        door(**{**given, **changes})


@pytest.mark.parametrize(
    ("door", "dynamic"), [(dpo_loss, None), (dpo_loss, True), (ipo_loss, True), (simpo_loss, None)]
)
def test_a_new_number_of_pairs_does_not_compile_again(door, dynamic):
    """The first number is compiled as it is, the second as one that varies; the bits are those of eager code."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: call(door, x), fullgraph=True, dynamic=dynamic, backend=counter)
    for count in (2, 3, 5, 8):
        x = pairs(torch.device("cpu"), count)
        got, expected = compiled(x), call(door, x)
        oracle.assert_same_bits("loss", got, expected)
        for a, b in zip(*(torch.autograd.grad(y, x[:2]) for y in (got, expected)), strict=True):
            oracle.assert_same_bits("grad", a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("door", "dynamic"), [*zip(LINEAR, (None, True, None), strict=True), (LINEAR[0], True)])
def test_a_new_number_of_pairs_or_tokens_does_not_compile_the_linear_loss_again(door, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(*given: Tensor) -> Tensor:
        return linear(door, *given, nll_weight=0.5).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for count, steps in ((2, 7), (3, 7), (5, 9), (8, 4)):
        given = head(torch.device("cpu"), count=count, steps=steps)
        got, expected = compiled(*given), loss(*given)
        oracle.assert_same_bits("loss", got, expected)
        for a, b in zip(*(torch.autograd.grad(y, given[:2]) for y in (got, expected)), strict=True):
            oracle.assert_same_bits("grad", a, b)
    assert counter.frame_count <= 3
