"""python -m benchmarks.logits_dtype [--rows 1024] [--rounds 5]

What float32 logits of 16-bit operands (`logits_dtype`) gain and cost on a trained model: hidden states of
SmolLM2-135M-Instruct over the answers of the demo's triples, its own head (V = 49152, D = 576), forward and backward of
`linear_token_logp` with c = 1 for each row. Errors are against float64 with the same operands: of a row's log-prob in
nats, the largest and the mean of all with its sign, and of the gradients relative in the Frobenius norm. CPU time is
beside that of bfloat16 with 16-bit logits, in turns, and memory the peak above what was there. Writes a dated CSV.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.grad_filter import hidden_states
from benchmarks.suite import dated_table
from benchmarks.suite.flags import whole_number
from benchmarks.suite.memory import peak_above_now
from wrpo_kernels import linear_token_logp

# Operands, and the logits_dtype that is asked for.
WAYS = (
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
    (torch.float32, None),
)
Given = tuple[Tensor, Tensor, Tensor]  # hidden states, head and targets


class Figure(NamedTuple):
    operands: str
    logits: str
    rounds: int
    forward_times: float  # beside 16-bit logits of bfloat16 operands, median over rounds
    step_times: float
    step_mib: float
    largest_error: float  # nats
    mean_error: float
    error_dh: float
    error_dW: float


def step(given: Given, logits_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, dh and dW."""
    hidden, weight, target = given
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    logp = linear_token_logp(*leaves, target, logits_dtype=logits_dtype)
    return logp.detach(), *torch.autograd.grad(logp.sum(), leaves)


def forward(given: Given, logits_dtype: torch.dtype | None) -> None:
    with torch.no_grad():
        linear_token_logp(*given, logits_dtype=logits_dtype)


def truth(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, a block of rows at a time."""
    hidden, weight, target = given
    wide, grad_weight, logps, grad_hidden = weight.double(), torch.zeros(weight.shape, dtype=torch.float64), [], []
    for h, y in zip(hidden.double().split(128), target.split(128), strict=True):
        logp = torch.log_softmax(h @ wide.t(), 1)
        delta, rows = -logp.exp(), torch.arange(len(y))
        delta[rows, y] += 1
        logps.append(logp[rows, y])
        grad_hidden.append(delta @ wide)
        grad_weight += delta.t() @ h
    return torch.cat(logps), torch.cat(grad_hidden), grad_weight


def seconds(call, *given) -> float:
    start = time.process_time()  # of this process alone: what else the machine does is left out
    call(*given)
    return time.process_time() - start


def measured(given: Given, rounds: int) -> Iterator[Figure]:
    """One figure for each of WAYS."""
    hidden, weight, target = given
    operands = {kind: (hidden.to(kind), weight.to(kind), target) for kind, _ in WAYS}
    taken: dict[tuple, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):  # the first to warm up
        for kind, logits in WAYS:
            taken[kind, logits].append(tuple(seconds(call, operands[kind], logits) for call in (forward, step)))
    exact = {kind: truth(one) for kind, one in operands.items()}
    for kind, logits in WAYS:
        pairs = zip(taken[kind, logits][1:], taken[WAYS[0]][1:], strict=True)
        times = [
            statistics.median(ratios) for ratios in zip(*[(a / c, b / d) for (a, b), (c, d) in pairs], strict=True)
        ]
        peak = peak_above_now(lambda kind=kind, logits=logits: step(operands[kind], logits)) / 2**20
        logp, *grads = step(operands[kind], logits)
        of_logp = logp - exact[kind][0]
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, exact[kind][1:], strict=True)]
        names = [str(x).removeprefix("torch.") for x in (kind, logits or kind)]
        yield Figure(*names, rounds, *times, peak, float(of_logp.abs().max()), float(of_logp.mean()), *errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole_number, default=1024)
    parser.add_argument("--rounds", type=whole_number, default=5)
    dated_table.add_out(parser)
    args = parser.parse_args()
    facts = dated_table.facts_of("benchmarks.logits_dtype", "cpu")
    given = hidden_states(args.rows)
    size = f"N = {len(given[2])}, V = {len(given[1])}, D = {given[1].shape[1]}"
    print(size, flush=True)
    figures = []
    for f in measured(given, args.rounds):
        figures.append(f)
        cost = f"forward {f.forward_times:.2f} step {f.step_times:.2f} {f.step_mib:.0f} MiB"
        errors = f"logp {f.largest_error:.1e} mean {f.mean_error:+.1e} dh {f.error_dh:.1e} dW {f.error_dW:.1e}"
        print(f"{f.operands:<8} operands, {f.logits:<8} logits   {cost}   errors: {errors}", flush=True)
    print("wrote", dated_table.write(figures, facts | {"problem": size}, args.out, "logits_dtype"))


if __name__ == "__main__":
    main()
