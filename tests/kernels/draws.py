"""What a random call is made of: shapes, types, layouts, options and values, decided by a seed and a case's number."""

from __future__ import annotations

import random
from typing import Any

import torch
from cases import laid_out
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    "contiguous",
    "contiguous",
    "padded rows",
    "misaligned",
    "transposed",
    "every other row",
    "every other column",
)
VOCABULARIES = (1, 2, 3, 7, 16, 17, 61, 64, 129, 257, 500, 1009, 4097)


class Draw:
    """What a case is made of; `said` names every choice."""

    def __init__(self, seed: int, case: int):
        self._random = random.Random(f"{seed} {case}")
        torch.manual_seed(self._random.getrandbits(62))
        self.said: dict[str, Any] = {}

    def pick(self, name: str, *choices: Any) -> Any:
        self.said[name] = value = self._random.choice(choices)
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        self.said[name] = value = self._random.randint(low, high)
        return value

    def number(self, name: str, low: float, high: float) -> float:
        self.said[name] = value = self._random.uniform(low, high)
        return value

    def chance(self, name: str, probability: float) -> bool:
        self.said[name] = value = self._random.random() < probability
        return value

    def order(self, values: list) -> list:
        return self._random.sample(values, len(values))

    def leaf(self, name: str, x: Tensor, probability: float = 0.7) -> Tensor:
        """In some layout, and perhaps with a gradient."""
        layout = self.pick(f"layout of {name}", *LAYOUTS) if x.dim() > 1 and x.numel() else "contiguous"
        return laid_out(x, layout).detach().requires_grad_(self.chance(f"gradient of {name}", probability))


def draw_head(draw: Draw, vocabulary: int, dtype: torch.dtype, backends: tuple[str, ...]) -> dict[str, Any]:
    bias = torch.randn(vocabulary).to(draw.pick("bias in", torch.float32, dtype))
    return {
        "bias": draw.leaf("bias", bias) if draw.chance("has bias", 0.5) else None,
        "logit_scale": draw.pick("logit_scale", 1.0, draw.number("-", -2.0, 2.0)),
        "softcap": draw.pick("softcap", None, draw.number("-", 0.5, 30.0)),
        "temperature": draw.pick("temperature", 1.0, draw.number("-", 0.5, 3.0)),
        "ignore_index": draw.pick("ignore_index", -100, -1, 0, vocabulary - 1, vocabulary, 1 << 40),
        "backend": draw.pick("backend", *backends),
    }


def draw_target(draw: Draw, shape: tuple[int, ...], vocabulary: int, ignore_index: int) -> Tensor:
    target = torch.randint(0, vocabulary, shape)
    ignored = torch.rand(shape) < draw.pick("share ignored", 0.0, 0.0, 0.3, 0.3, 0.3, 0.3, 0.7, 1.0)
    return target.masked_fill(ignored, ignore_index)


def draw_adapter(draw: Draw, shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype) -> Any:
    """(low [..., r], up [V, r]) or None."""
    if not draw.chance("has adapter", 0.3):
        return None
    rank, kind = draw.whole("rank", 1, 5), draw.pick("adapter in", torch.float32, dtype)
    low, up = torch.randn(*shape, rank) / 2, torch.randn(vocabulary, rank) / 2
    return draw.leaf("low", low.to(kind)), draw.leaf("up", up.to(kind))


def draw_linear(draw: Draw, shape: tuple[int, ...], backends: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(hidden, weight, target; options) of a head over positions of that shape."""
    dtype, width = draw.pick("dtype", *DTYPES), draw.pick("width", 1, 2, 8, 17, 33)
    vocabulary = draw.pick("vocabulary", *VOCABULARIES[:-1])
    options = draw_head(draw, vocabulary, dtype, backends)
    target = draw_target(draw, shape, vocabulary, options["ignore_index"])
    hidden = torch.randn(*shape, width)
    if draw.chance("NaN where ignored", 0.3):
        hidden[target == options["ignore_index"]] = torch.nan
    weight = torch.randn(vocabulary, width) * 2 / width**0.5
    tensors = {
        "hidden": draw.leaf("hidden", hidden.to(dtype)),
        "weight": draw.leaf("weight", weight.to(draw.pick("weight in", dtype, dtype, torch.float32))),
        "target": target,
    }
    options["adapter"] = draw_adapter(draw, shape, vocabulary, dtype)
    counted = int((target != options["ignore_index"]).sum())
    options["num_rows"] = draw.pick("num_rows", None, counted)
    everything = max(1, counted * (vocabulary + 4 * (width + 5)) * dtype.itemsize)
    options["budget_bytes"] = draw.pick("budget_bytes", None, 1, draw.whole("-", 1, everything))
    options["logits_dtype"] = draw.pick("logits_dtype", None, torch.float32 if dtype.itemsize == 2 else dtype)
    return tensors, options


def draw_loss(draw: Draw, num_sequences: int) -> dict[str, Any]:
    """The options of `preference_loss` but for `length`; every group has a sequence."""
    num_groups = draw.whole("groups", 1, num_sequences)
    group = [*range(num_groups), *(draw.whole("-", 0, num_groups - 1) for _ in range(num_sequences - num_groups))]
    loss_type = draw.pick("loss_type", "sigmoid", "sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "kto")
    reduction = draw.pick("reduction", "mean", "mean", "sum", "none")
    smoothing = draw.pick("label_smoothing", 0.0, draw.number("-", 0.001, 0.49))
    smoothing = {"sigmoid": smoothing, "robust": smoothing, "exo_pair": smoothing or 0.001}.get(loss_type, 0.0)
    beta = draw.number("beta", 0.2, 2.0) if loss_type == "ipo" else 10 ** draw.number("log10 beta", -2.0, 0.5)
    gamma = draw.pick("gamma", 0.0, draw.number("-", -1.0, 1.0))
    return {
        "seq_weight": torch.randn(num_sequences) * (torch.rand(num_sequences) > 0.15),
        "group": torch.tensor(draw.order(group)),
        "num_groups": num_groups,
        "beta": draw.pick("beta is", beta, beta, beta * (1 + torch.rand(num_groups))),
        "gamma": draw.pick("gamma is", gamma, gamma, torch.randn(num_groups)),
        "loss_type": loss_type,
        "label_smoothing": smoothing,
        "discopop_tau": draw.pick("discopop_tau", 0.05, draw.number("-", 0.1, 0.9)),
        "length_normalize": draw.chance("length_normalize", 0.4),
        "nll_weight": draw.pick("nll_weight", 0.0, draw.number("-", 0.0, 1.0), torch.randn(num_sequences)),
        "group_weight": draw.pick("group_weight", None, torch.randn(num_groups) * (torch.rand(num_groups) > 0.15)),
        "reduction": reduction,
        "normalizer": draw.pick("normalizer", None, *_normalizers(draw)) if reduction == "mean" else None,
    }


def _normalizers(draw: Draw) -> tuple[float | Tensor, ...]:
    value = draw.number("-", 0.5, 9.0)
    return value, torch.tensor(value)


def draw_wrpo(draw: Draw, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with the weights of WRPO's layout, and the options of its doors, which are told alpha instead."""
    sources, examples = draw.whole("sources", 1, 3), draw.whole("examples", 1, 3)
    total = torch.rand(examples, dtype=torch.float64)
    shares = torch.rand(examples, sources, dtype=torch.float64)
    by_source = shares / shares.sum(1, keepdim=True) * total[:, None]
    even = total[:, None].expand(examples, sources) / sources
    form = draw.pick("alpha", "number", "0-d", "[B]", "[B, K]")
    if form in ("number", "0-d"):
        even = even[:1].expand(examples, sources)
    alpha = {"number": float(total[0]), "0-d": total[0], "[B]": total, "[B, K]": by_source}[form]
    weights = by_source if form == "[B, K]" else even  # [B, K]
    seq_weight = torch.cat([weights.T.reshape(-1), 1 - weights.sum(1), -torch.ones(examples, dtype=torch.float64)])
    layout = {"seq_weight": seq_weight, "group": torch.arange(examples).repeat(sources + 2), "num_groups": examples}
    sized = {"nll_weight": len(seq_weight), "group_weight": examples, "gamma": examples, "beta": examples}
    fitting = {name: torch.randn(size) for name, size in sized.items() if isinstance(options[name], Tensor)}
    fitting = {name: value.abs() + 0.2 if name == "beta" else value for name, value in fitting.items()}
    told = {name: value for name, value in (options | fitting).items() if name not in layout}
    return options | layout | fitting, told | {"alpha": alpha, "num_sources": sources}


def draw_reference(draw: Draw, num_sequences: int) -> Tensor | None:
    return -20 * torch.rand(num_sequences) if draw.chance("has reference", 0.7) else None


def draw_cotangent(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) > 0.2)
