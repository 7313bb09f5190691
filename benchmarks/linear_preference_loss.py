"""python -m benchmarks.linear_preference_loss [--rounds 15] [--only bfloat16]

Forward and backward of the fused loss beside the bare matrix products of the same rows, in the same run:
DPO pairs, 4 sequences of 512 tokens of which the first half is prompt, D = 1024, V = 65536. Then the overhead at toy
size beside plain torch, and the peak memory in a fresh process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import in_fresh_process, milliseconds, peak_above_now, ratio, time_in_turns
from wrpo_kernels import linear_preference_loss

WIDE = {"sequences": 4, "length": 512, "prompt": 256, "width": 1024, "vocabulary": 65536}
TOY = {"sequences": 4, "length": 16, "prompt": 0, "width": 64, "vocabulary": 1000}


class Problem:
    """Hidden states, head and labels of one scenario; `trained` says whether the head gets a gradient."""

    def __init__(self, sequences, length, prompt, width, vocabulary, dtype, trained=True):
        torch.manual_seed(0)
        self.hidden = torch.randn(sequences, length, width).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, width) * 0.02).to(dtype).requires_grad_(trained)
        self.labels = torch.randint(0, vocabulary, (sequences, length))
        self.labels[:, :prompt] = -100
        self.ref_logp = torch.full((sequences,), -11.0 * (length - prompt))
        self.seq_weight = torch.tensor([1.0, -1.0]).repeat(sequences // 2)
        self.group = torch.arange(sequences // 2).repeat_interleave(2)

    def fused(self, **options) -> torch.Tensor:
        pairs = {"seq_weight": self.seq_weight, "group": self.group, "num_groups": len(self.group) // 2}
        out = linear_preference_loss(self.hidden, self.weight, self.labels, self.ref_logp, beta=0.1, **pairs, **options)
        return out.loss

    def plain(self) -> torch.Tensor:
        """What a user of plain torch writes."""
        logits = F.linear(self.hidden, self.weight).float()
        counted = self.labels != -100
        logp = logits.log_softmax(-1).gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        reward = 0.1 * ((logp * counted).sum(1) - self.ref_logp)
        return -F.logsigmoid(reward[0::2] - reward[1::2]).mean()

    def step(self, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            self.hidden.grad = self.weight.grad = None
            loss().backward()

        return forward_and_backward

    def products(self) -> Callable[[], None]:
        """The floor: logits, dh and, for a trained head, dW of the rows that count, into buffers that exist."""
        rows = self.hidden.detach()[self.labels != -100]
        weight = self.weight.detach()
        logits = torch.empty(len(rows), len(weight), dtype=rows.dtype)
        dh, dw = torch.empty_like(rows), torch.empty_like(weight)

        def run() -> None:
            torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits, weight, out=dh)
            if self.weight.requires_grad:
                torch.mm(logits.t(), rows, out=dw)

        return run


def compare(title: str, contestants: dict[str, Callable[[], object]], floor: str, rounds: int) -> None:
    seconds = time_in_turns(contestants, rounds)
    for name in contestants:
        p20, p50, p80 = milliseconds(seconds[name])
        times = ratio(seconds, name, floor)
        print(f"{title:<28} {name:<10} {p50:9.3f} ms  [{p20:.3f}, {p80:.3f}]  {times:6.3f} x {floor}", flush=True)


def measure_peak(dtype: str, trained: bool) -> None:
    """Prints MiB of the peak above inputs, outputs and gradients of one step."""
    problem = Problem(**WIDE, dtype=getattr(torch, dtype), trained=trained)
    warm = Problem(**TOY, dtype=getattr(torch, dtype), trained=trained)
    warm.step(warm.fused)()  # thread pools and code pages are not the op's
    peak = peak_above_now(problem.step(problem.fused))
    grads = sum(x.grad.nbytes for x in (problem.hidden, problem.weight) if x.grad is not None)
    print(f"{(peak - grads) / 2**20:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, metavar=("DTYPE", "HEAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return measure_peak(args.peak[0], args.peak[1] == "trained")
    dtypes = [args.only] if args.only else ["bfloat16", "float32"]
    for name in dtypes:
        for head in ("trained", "frozen"):
            problem = Problem(**WIDE, dtype=getattr(torch, name), trained=head == "trained")
            contestants = {"products": problem.products(), "fused": problem.step(problem.fused)}
            compare(f"{name} {head} head", contestants, "products", args.rounds)
            peak = in_fresh_process("benchmarks.linear_preference_loss", "--peak", name, head)
            print(f"{name + ' ' + head + ' head':<28} fused      {peak} MiB above inputs, outputs and gradients")
    for name in dtypes:
        toy = Problem(**TOY, dtype=getattr(torch, name))
        contestants = {"plain": toy.step(toy.plain), "fused": toy.step(toy.fused)}
        compare(f"{name} N=64 D=64 V=1000", contestants, "plain", 40 * args.rounds)


if __name__ == "__main__":
    main()
