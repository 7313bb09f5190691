"""python -m benchmarks.grad_filter [--rows 1024] [--rounds 5] [--dtype bfloat16]

What `grad_filter` saves and costs on a trained model: hidden states of SmolLM2-135M-Instruct over the answers of the
demo's triples, its own head (V = 49152, D = 576), forward and backward of `linear_token_logp` with c = 1 for each row.
For several eps: the CPU time beside that of the exact gradients, the share of the vocabulary that is left, and the
error of the gradients against float64, relative in the Frobenius norm. Writes a dated CSV.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.suite import dated_table
from benchmarks.suite.flags import whole_number
from wrpo_kernels import linear_token_logp
from wrpo_kernels.lm_head.column_filter import columns_that_count

BOUNDS = (None, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3)


class Figure(NamedTuple):
    eps: str
    rounds: int
    times_exact: float  # CPU time beside that of the exact gradients, median over rounds
    columns: float  # share of the vocabulary that counts
    error_dh: float
    error_dW: float


def hidden_states(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, D], the head [V, D] and the next tokens [rows] of the demo's answers, in float32."""
    from wrpo.demo.make_triples import shipped_rows
    from wrpo.demo.model import load

    model, tokenizer = load()[:2]
    model = model.float().eval()
    hidden, target, taken = [], [], 0
    for triple in shipped_rows(ties=False):
        answer = triple["target_chosen"]
        messages = [{"role": "user", "content": triple["prompt"]}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            states = model.get_decoder()(ids).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        target.append(ids[0, len(prompt) :])
        taken += len(target[-1])
        if taken >= rows:
            break
    return torch.cat(hidden)[:rows], model.lm_head.weight.detach(), torch.cat(target)[:rows]


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    return torch.autograd.grad(linear_token_logp(*leaves, target, grad_filter=eps).sum(), leaves)


def truth(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta [N, V] in float32, and dh and dW in float64, a block of rows at a time."""
    wide, grad_weight, grad_hidden, deltas = weight.double(), torch.zeros(weight.shape, dtype=torch.float64), [], []
    for h, y in zip(hidden.double().split(128), target.split(128), strict=True):
        delta = -torch.softmax(h @ wide.t(), 1)
        delta[torch.arange(len(y)), y] += 1
        grad_hidden.append(delta @ wide)
        grad_weight += delta.t() @ h
        deltas.append(delta.float())
    return torch.cat(deltas), torch.cat(grad_hidden), grad_weight


def measured(given: tuple[Tensor, Tensor, Tensor], rounds: int) -> Iterator[Figure]:
    """given: hidden states, head and targets. One figure for each of BOUNDS."""
    delta, *exact = truth(*given)
    seconds: dict[float | None, list[float]] = {eps: [] for eps in BOUNDS}
    for _ in range(rounds + 1):  # the first to warm up
        for eps in BOUNDS:
            start = time.process_time()  # of this process alone: what else the machine does is left out
            gradients(*given, eps)
            seconds[eps].append(time.process_time() - start)
    for eps in BOUNDS:
        ratios = [a / b for a, b in zip(seconds[eps][1:], seconds[None][1:], strict=True)]
        left = columns_that_count(delta, given[2], eps or 0.0)
        share = 1.0 if left is None else len(left) / len(given[1])
        pairs = zip(gradients(*given, eps), exact, strict=True)
        errors = [float((got.double() - true).norm() / true.norm()) for got, true in pairs]
        yield Figure("exact" if eps is None else f"{eps:g}", rounds, statistics.median(ratios), share, *errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole_number, default=1024)
    parser.add_argument("--rounds", type=whole_number, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    dated_table.add_out(parser)
    args = parser.parse_args()
    facts = dated_table.facts_of("benchmarks.grad_filter", "cpu")
    hidden, weight, target = hidden_states(args.rows)
    kind = getattr(torch, args.dtype)
    size = f"N = {len(target)}, V = {len(weight)}, D = {weight.shape[1]}, {args.dtype}"
    print(size, flush=True)
    figures = []
    for f in measured((hidden.to(kind), weight.to(kind), target), args.rounds):
        figures.append(f)
        errors = f"relative error dh {f.error_dh:.2e}  dW {f.error_dW:.2e}"
        print(f"eps {f.eps:<7} time {f.times_exact:.3f} of exact   columns {f.columns:6.1%}   {errors}", flush=True)
    print("wrote", dated_table.write(figures, facts | {"problem": size}, args.out, "grad_filter"))


if __name__ == "__main__":
    main()
