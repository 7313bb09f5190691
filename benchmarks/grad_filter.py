"""python -m benchmarks.grad_filter [--rows 1024] [--rounds 5] [--dtype bfloat16]

What `grad_filter` saves and costs on a trained model: hidden states of SmolLM2-135M-Instruct over the answers of the
demo's triples, its own head (V = 49152, D = 576), forward and backward of `linear_token_logp` with c = 1 for each row.
For several eps: the CPU time beside that of the exact gradients, the share of the vocabulary that is left, and the
error of the gradients against float64, relative in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files

import torch
from torch import Tensor

from wrpo_kernels import linear_token_logp
from wrpo_kernels.column_filter import columns_that_count

BOUNDS = (None, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def hidden_states(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, D], the head [V, D] and the next tokens [rows] of the demo's answers, in float32."""
    from wrpo.demo.model import load

    model, tokenizer = load()[:2]
    model = model.float().eval()
    hidden, target, taken = [], [], 0
    for line in files("wrpo.demo").joinpath("triples.jsonl").read_text().splitlines():
        triple = json.loads(line)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    given = hidden_states(args.rows)
    hidden, weight, target = given[0].to(getattr(torch, args.dtype)), given[1].to(getattr(torch, args.dtype)), given[2]
    delta, *exact = truth(hidden, weight, target)
    print(f"N = {len(target)}, V = {len(weight)}, D = {weight.shape[1]}, {args.dtype}")
    seconds: dict[float | None, list[float]] = {eps: [] for eps in BOUNDS}
    for _ in range(args.rounds + 1):  # the first to warm up
        for eps in BOUNDS:
            start = time.process_time()  # of this process alone: what else the machine does is left out
            gradients(hidden, weight, target, eps)
            seconds[eps].append(time.process_time() - start)
    for eps in BOUNDS:
        left = columns_that_count(delta, target, eps or 0.0)
        share = 1.0 if left is None else len(left) / len(weight)
        errors = [
            float((g.double() - true).norm() / true.norm())
            for g, true in zip(gradients(hidden, weight, target, eps), exact, strict=True)
        ]
        ratios = sorted(a / b for a, b in zip(seconds[eps][1:], seconds[None][1:], strict=True))
        print(
            f"eps {eps!s:<8} time {ratios[len(ratios) // 2]:.3f} of exact   columns {100 * share:5.1f} %   "
            f"relative error dh {errors[0]:.2e}  dW {errors[1]:.2e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
