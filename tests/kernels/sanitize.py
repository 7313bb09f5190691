"""Every native CUDA kernel once on ugly shapes, small enough for compute-sanitizer (`make sanitize`).

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/sanitize.py

Without torch's caching allocator every tensor has its own allocation, so a step outside one is seen. `--played` runs
the same calls on the CPU, with the kernels played on the host.
"""

from __future__ import annotations

import argparse
import itertools

import played
import pytest
import torch

from wrpo_kernels import preference_loss
from wrpo_kernels.linear_token_statistics import cuda as statistics
from wrpo_kernels.linear_token_statistics import reference as plain_statistics
from wrpo_kernels.linear_token_statistics.wanted import Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss import cuda as losses
from wrpo_kernels.token_logp import cuda, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 513, 4099, 65537)  # less than a pack, a block and a shared buffer, and more; all misalign rows
OFFSETS = (0, 1)  # elements before the first row


def check_rows(dtype: torch.dtype, vocabulary: int, offset: int, transform: LogitTransform, device: str) -> None:
    logits = torch.randn(3 * vocabulary + offset, device=device).to(dtype)[offset:].view(3, vocabulary)
    target = torch.tensor([vocabulary - 1, -100, 0], device=device)
    logp, expected = (torch.empty(3, device=device) for _ in range(2))
    lse, expected_lse = (torch.empty(2, 3, device=device) for _ in range(2))
    cuda.forward(logits, target, -100, transform, logp, lse)
    reference.forward(logits, target, -100, transform, expected, expected_lse)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-4)
    grad = torch.empty_like(logits)
    cuda.grad(logits, target, -100, transform, logp, lse, torch.ones_like(logp), grad)
    cuda.delta_(logits, target, -100, transform, logp, lse)
    torch.testing.assert_close(grad, logits, rtol=2e-2, atol=1e-6)


def check_statistics(dtype: torch.dtype, vocabulary: int, offset: int, transform: LogitTransform, device: str) -> None:
    logits = torch.randn(3 * vocabulary + offset, device=device).to(dtype)[offset:].view(3, vocabulary)
    told = (torch.tensor([vocabulary - 1, -100, 0], device=device), -100, transform, Wanted(*[True] * 4))
    found, coef = [], torch.randn(3, 6, device=device)
    for kernel in (statistics, plain_statistics):
        values, top1 = torch.empty(3, 6, device=device), torch.empty(3, dtype=torch.int64, device=device)
        kernel.statistics(logits, *told, values, top1)
        grad = logits.clone()
        kernel.grad_(grad, *told, values, coef)
        found.append((values, grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-4)


def check_losses(sequences: int, groups: int, device: str) -> None:
    length = torch.randint(0, 300, (sequences,), device=device)
    rows = torch.randn(int(length.sum()), device=device)
    sums = losses.sequence_sum(rows, length)
    losses.over_rows(sums, length, len(rows))
    options = {"group": torch.arange(sequences, device=device) % groups, "num_groups": groups, "beta": 0.1}
    options |= {"seq_weight": torch.randn(sequences, device=device), "reduction": "none"}
    got, expected = (preference_loss(sums, **options, backend=name).loss for name in ("cuda", "reference"))
    torch.testing.assert_close(got, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--played", action="store_true", help="play the kernels on the CPU instead")
    args = parser.parse_args()
    if args.played:
        played.use(played.module(), pytest.MonkeyPatch())
    device, calls = "cpu" if args.played else "cuda", 0
    torch.manual_seed(0)
    for dtype, vocabulary, offset in itertools.product(DTYPES, VOCABULARIES, OFFSETS):
        bias = torch.randn(vocabulary, device=device)
        for transform in (LogitTransform(None, 1.0, 0.0, 1.0), LogitTransform(bias, 0.5, 30.0, 0.7)):
            check_rows(dtype, vocabulary, offset, transform, device)
            check_statistics(dtype, vocabulary, offset, transform, device)
            calls += 5
    for sequences, groups in ((1, 1), (5, 3), (130, 129), (1000, 300)):
        check_losses(sequences, groups, device)
        calls += 3
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of the CUDA kernels on {device} agree with plain torch")


if __name__ == "__main__":
    main()
