"""The shapes, values and layouts worth trying, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from oracle import Transform
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    reason: str
    leading: tuple[int, ...] = (5,)  # shape of the targets
    vocabulary: int = 61
    width: int = 24  # D, of the linear ops
    values: str = "normal"
    target: str = "mixed"
    layout: str = "contiguous"


SHAPES = {
    "empty": Case("no rows: returns before any kernel runs", leading=(0,)),
    "empty batch": Case("a zero anywhere in the leading shape", leading=(3, 0)),
    "no leading shape": Case("a single row without a row dimension", leading=()),
    "one row": Case("a matrix-vector product, one block of rows", leading=(1,), vocabulary=4096),
    "one token": Case("the only token has probability 1: logp and gradients are 0", vocabulary=1),
    "two tokens": Case("less than one SIMD lane", vocabulary=2),
    "primes": Case("no size divides any block", leading=(13,), vocabulary=1009, width=17),
    "width one": Case("a product of vectors", width=1),
    "batch": Case("several leading dimensions", leading=(2, 3, 4), vocabulary=257),
    "just over a block": Case("one element in the last block of 4096", vocabulary=4097),
    "just under a block": Case("a tail that is one short", vocabulary=4095),
    "Llama-2": Case("V = 32000", leading=(3,), vocabulary=32000, width=8),
    "SmolLM2": Case("V = 49152", leading=(3,), vocabulary=49152, width=8),
    "GPT-2": Case("V = 50257, odd: rows are not aligned", leading=(3,), vocabulary=50257, width=8),
    "Llama-3": Case("V = 128256", leading=(3,), vocabulary=128256, width=8),
    "ragged 129920": Case("V = 129920, no multiple of 512", leading=(2,), vocabulary=129920, width=8),
    "Qwen": Case("V = 151936", leading=(2,), vocabulary=151936, width=8),
    "Gemma": Case("V = 256000", leading=(2,), vocabulary=256000, width=8),
}
VALUES = {
    "peaked": Case("1 - p cancels; gradients are tiny or one-sided", leading=(16,), vocabulary=509, values="peaked"),
    "huge": Case("logits of +-1e4: exp overflows unless the maximum is taken out first", values="huge"),
    "equal": Case("all tokens equally likely: logp = -log V", values="equal"),
    "all ignored": Case("a batch without a label that counts", target="ignored"),
    "ends": Case("targets 0 and V - 1", leading=(8,), vocabulary=1031, target="ends"),
    "last row counts": Case("rows are compacted to one", leading=(7,), target="last"),
}
MINUS_INFINITY = Case("logits masked by -inf have probability 0 and no gradient", (8,), 67, values="minus infinity")
LAYOUTS = {
    "padded rows": Case("row stride larger than V", layout="padded rows"),
    "misaligned": Case("storage starts one element off any vector boundary", layout="misaligned"),
    "transposed": Case("the last dimension is not contiguous", layout="transposed"),
    "every other row": Case("a slice with a step", layout="every other row"),
    "every other column": Case("a slice with a step in the last dimension", layout="every other column"),
    "expanded": Case("stride 0: all rows are one", layout="expanded"),
    "batch of slices": Case("leading dimensions that no view can flatten", leading=(2, 3), layout="batch of slices"),
}

TRANSFORMS: dict[str, Callable[[Tensor], Transform]] = {
    "bias": lambda bias: Transform(bias=bias),
    "Cohere": lambda bias: Transform(logit_scale=0.0625),
    "Granite": lambda bias: Transform(logit_scale=1 / 6),
    "Gemma": lambda bias: Transform(softcap=30.0),
    "temperature": lambda bias: Transform(temperature=0.7),
    "saturating softcap": lambda bias: Transform(softcap=0.9),
    "all of them": lambda bias: Transform(bias=bias, logit_scale=1.3, softcap=5.0, temperature=1.7),
}


def logits_of(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """logits [..., V] and target [...]"""
    shape = (*case.leading, case.vocabulary)
    target = targets_of(case, device)
    if case.values == "huge":
        logits = 1e4 * torch.sign(torch.randn(shape)) * torch.rand(shape).round()
    elif case.values == "equal":
        logits = torch.full(shape, 3.25)
    else:
        logits = 3 * torch.randn(shape)
    if case.values == "peaked":
        favourite = torch.where(torch.arange(target.numel()) % 2 == 0, target.flatten().cpu().clamp(min=0), 5)
        logits.view(-1, shape[-1])[torch.arange(target.numel()), favourite] = 20.0
    if case.values == "minus infinity":
        logits[torch.rand(shape) < 0.3] = -torch.inf
        logits[..., 1] = 0.5  # no row without any token
        logits[0, target[0]] = -torch.inf  # an impossible target
        logits[3] = torch.where(torch.arange(shape[-1]) == target[3].cpu(), 1.0, -torch.inf)  # a certain one
    return laid_out(logits.to(dtype).to(device), case.layout), target


def hidden_of(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [..., D], weight [V, D] and target [...]; logits of about unit variance unless the case says otherwise."""
    hidden = torch.randn(*case.leading, case.width)
    weight = torch.randn(case.vocabulary, case.width) / case.width**0.5
    target = targets_of(case, device)
    if case.values == "huge":
        hidden, weight = 1e3 * hidden, 4 * weight
    elif case.values == "equal":
        weight = weight[:1].repeat(case.vocabulary, 1)
    elif case.values == "peaked":
        hidden[::2] = 20 * weight[target[::2].cpu().clamp(min=0)] / weight[0].norm() ** 2
    hidden, weight = hidden.to(dtype).to(device), weight.to(dtype).to(device)
    return laid_out(hidden, case.layout), laid_out(weight, case.layout), target


def targets_of(case: Case, device: torch.device) -> Tensor:
    target = torch.randint(0, case.vocabulary, case.leading)
    flat = target.view(-1)
    if case.target == "ignored":
        flat[:] = -100
    elif case.target == "ends":
        flat[::2], flat[1::2] = 0, case.vocabulary - 1
    elif case.target == "last":
        flat[:-1] = -100
    else:
        flat[2::4] = -100
    return target.to(device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded") at other addresses; what lies between them is NaN."""
    if layout == "contiguous":
        return x
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    shape = list(x.shape)
    if layout == "misaligned":
        view = x.new_full((x.numel() + 1,), torch.nan)[1:].view(shape)
    elif layout == "every other row":
        view = x.new_full([2 * shape[0], *shape[1:]], torch.nan)[::2]
    elif layout == "every other column":
        view = x.new_full([*shape[:-1], 2 * shape[-1]], torch.nan)[..., ::2]
    elif layout == "padded rows":
        view = x.new_full([*shape[:-1], shape[-1] + 3], torch.nan)[..., : shape[-1]]
    else:
        view = x.new_full([shape[0], *[size + 1 for size in shape[1:]]], torch.nan)
        view = view[(slice(None), *(slice(size) for size in shape[1:]))]
    return view.copy_(x)


def cotangent(target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An upstream gradient like those of a real loss: uneven by decades, of both signs, sometimes 0."""
    c = torch.randn(target.shape) * 10 ** (2 * torch.rand(target.shape) - 1.5)
    c.view(-1)[1::5] = 0.0
    return c.to(target.device, dtype)
