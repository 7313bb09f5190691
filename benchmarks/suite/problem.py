"""What every contestant of the benchmarks is given: hidden states, a head and the responses of one setting.

A setting is plain data, so that a fresh process can build the very same problem; the numbers in it come from one seed.
A contestant is a `Rival`: it says why it cannot do a problem, or makes the loss of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels import preference_loss

IGNORED = -100
ALPHA = 0.5  # of the sources together: every response then weighs enough to show in the gradients
RANK = 16  # of the adapter on a LoRA head


class Setting(NamedTuple):
    """Sizes and kind of one problem.

    examples: G groups of `sources` + 2 responses (source-preferred, target-preferred, rejected); 0 sources: DPO pairs.
    response, prompt: tokens of each sequence that count, and before them tokens that do not.
    dtype: of hidden states and head. head: "trained", "frozen", "lora" (an adapter of rank 16 on a frozen head) or
    "no_grad" (the forward alone). budget_mib: of logits at a time, for the contestants that have such a bound; None is
    their default.
    """

    vocabulary: int
    width: int
    examples: int = 1
    sources: int = 0
    response: int = 256
    prompt: int = 0
    dtype: str = "float32"
    head: str = "trained"
    softcap: float | None = None
    logit_scale: float = 1.0
    beta: float = 0.01
    budget_mib: int | None = None

    @property
    def sequences(self) -> int:
        return self.examples * max(2, self.sources + 2)

    @property
    def num_rows(self) -> int:
        """N, the rows that count."""
        return self.sequences * self.response

    @property
    def trains_head(self) -> bool:
        """The head itself, or the adapter on it."""
        return self.head in ("trained", "lora")

    @property
    def num_products(self) -> int:
        """Products of 2 N D V flops that the gradients need: logits; dh; dW."""
        return {"trained": 3, "lora": 2, "frozen": 2, "no_grad": 1}[self.head]

    @property
    def columns(self) -> int:
        """Of the operands of the logits: D, and the rank of an adapter."""
        return self.width + (RANK if self.head == "lora" else 0)

    @property
    def flops(self) -> float:
        """Of these products, and of an adapter's: its share of the logits, dlow and dup."""
        columns = self.num_products * self.width + (3 * RANK if self.head == "lora" else 0)
        return 2.0 * self.num_rows * columns * self.vocabulary

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


class Problem:
    """The tensors of a setting.

    Attributes:
        hidden: [S, T, D] leaf; asks for a gradient unless the head is "no_grad".
        weight: [V, D] leaf; asks for a gradient if the head is "trained".
        adapter: (A [r, D], B [V, r]) leaves that ask for gradients if the head is "lora", else None.
        labels: [S, T] int64; labels[s, t] is predicted from hidden[s, t], IGNORED where it is prompt.
        ref_logp: [S] float32. seq_weight: [S] float32, signed; group: [S] int64; num_groups: G.
            All first responses come first, then all second ones, ...; in DPO pairs: all chosen, then all rejected.
    """

    def __init__(self, setting: Setting, device: str = "cpu"):
        self.setting, self.device = setting, torch.device(device)
        made = torch.Generator(device).manual_seed(0)
        dtype, length = getattr(torch, setting.dtype), setting.prompt + setting.response
        asks = setting.head != "no_grad"

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=made, device=device) * scale).to(dtype)

        self.hidden = normal(setting.sequences, length, setting.width).requires_grad_(asks)
        # Logits of variance 1: the loss is near log 2 and no probability is all or nothing.
        self.weight = normal(setting.vocabulary, setting.width, scale=setting.width**-0.5)
        self.weight.requires_grad_(setting.head == "trained")
        self.adapter = None
        if setting.head == "lora":
            down = normal(RANK, setting.width, scale=setting.width**-0.5).requires_grad_()
            self.adapter = (down, normal(setting.vocabulary, RANK, scale=0.1).requires_grad_())
        labels = (setting.sequences, length)
        self.labels = torch.randint(0, setting.vocabulary, labels, generator=made, device=device)
        self.labels[:, : setting.prompt] = IGNORED
        expected = -(math.log(setting.vocabulary) + 0.5) * setting.response
        self.ref_logp = torch.full((setting.sequences,), expected, device=device)
        self.num_groups, self.beta = setting.examples, setting.beta
        self.softcap, self.logit_scale = setting.softcap, setting.logit_scale
        self.seq_weight = torch.tensor(response_weights(setting.sources), device=device)
        self.seq_weight = self.seq_weight.repeat_interleave(setting.examples)
        self.group = torch.arange(setting.examples, device=device).repeat(setting.sequences // setting.examples)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """low [S, T, r] and up [V, r] of the adapter, for a loss to call anew in each step."""
        if self.adapter is None:
            return None
        down, up = self.adapter
        return self.hidden @ down.t(), up

    def operands(self) -> tuple[Tensor, Tensor]:
        """hidden [S, T, D'] and weight [V, D'] of the logits, for contestants that know no adapter.

        It makes the product longer, h W^T + low up^T = [h, low] [W, up]^T, so that its gradients come back through the
        same two operands as those of any other head.
        """
        adapter = self.low_rank()
        if adapter is None:
            return self.hidden, self.weight
        low, up = adapter
        return torch.cat([self.hidden, low], -1), torch.cat([self.weight, up], 1)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that a step gives gradients to, by name."""
        named = {"dh": self.hidden, "dW": self.weight}
        if self.adapter is not None:
            named |= {"dA": self.adapter[0], "dB": self.adapter[1]}
        return {name: leaf for name, leaf in named.items() if leaf.requires_grad}

    def forget_gradients(self) -> None:
        for leaf in self.leaves().values():
            leaf.grad = None

    def loss_of(self, logp: Tensor) -> Tensor:
        """The mean loss of the groups from sequence log-probs [S] float32, for contestants that end at those."""
        layout = {"seq_weight": self.seq_weight, "group": self.group, "num_groups": self.num_groups}
        return preference_loss(logp, self.ref_logp, beta=self.beta, **layout).loss

    def products(self) -> Callable[[], None]:
        """The floor: logits, dh, dW of the rows that count, as many of them as the head needs, into ready buffers."""
        counts, weight = self.labels != IGNORED, self.weight.detach()
        with torch.no_grad():
            rows, adapter = self.hidden[counts], self.low_rank()
        number = self.setting.num_products
        logits = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=self.device)
        dh, dw = torch.empty_like(rows), torch.empty_like(weight) if number > 2 else None
        if adapter is not None:
            low, up = adapter[0][counts].detach(), adapter[1].detach()
            dlow, dup = torch.empty_like(low), torch.empty_like(up)

        @torch.no_grad()
        def run() -> None:
            torch.mm(rows, weight.t(), out=logits)
            if adapter is not None:
                logits.addmm_(low, up.t())
                torch.mm(logits, up, out=dlow)
                torch.mm(logits.t(), low, out=dup)
            if number > 1:
                torch.mm(logits, weight, out=dh)
            if number > 2:
                torch.mm(logits.t(), rows, out=dw)

        return run


class Rival(NamedTuple):
    """A contestant.

    name: as the tables print it. why_not: the reason why it cannot do a problem here (not installed, no such form), or
    None. loss: makes, from a problem, a function without arguments that computes the scalar loss anew; its backward
    fills `.grad` of `problem.leaves()`. The caller clears gradients, and runs a "no_grad" problem in torch.no_grad().
    module: what it imports of a package of its own; "" is none.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    loss: Callable[[Problem], Callable[[], Tensor]]
    module: str = ""


def response_weights(sources: int) -> list[float]:
    """Of the responses of one group: alpha / K each source, 1 - alpha the target's own, -1 the rejected."""
    if not sources:
        return [1.0, -1.0]
    return [ALPHA / sources] * sources + [1.0 - ALPHA, -1.0]
