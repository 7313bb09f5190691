"""What would run on this machine, and why not the others; `wrpo info` and `python -m wrpo_kernels` print it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from wrpo_kernels.dispatch import cuda_launch
from wrpo_kernels.dispatch.backends import load_extension, why_not
from wrpo_kernels.lm_head.budget import DEFAULT_BUDGET, MOST_OF_ACCELERATOR, SHARE_OF_ACCELERATOR, default_budget
from wrpo_kernels.lm_head.products import multiplies_fast, prefers_own, prefers_transposed
from wrpo_kernels.preference_loss import contract as preference_contract
from wrpo_kernels.token_logp import contract as token_contract
from wrpo_kernels.version import __version__

__all__ = ["default_backend", "default_budget", "report"]


def report() -> str:
    """What would run on this machine, and why not the others, as text that a bug report can hold.

    Returns:
        Lines with versions, what was built, and for each device the backend that runs where none is named.
    """
    return "\n".join([*_versions(), "", *_native(), *_cuda(), "", *_backends()])


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that turns logits into log-probs where none is named.

    Args:
        device: where the logits are.
        dtype: float32 | bfloat16 | float16 | float64.

    Returns:
        "native", "cuda", "triton" or "reference".
    """
    probe = torch.empty(1, 1, dtype=dtype, device=device)
    return next(module.NAME for module in token_contract.CANDIDATES if why_not(module, probe) is None)


def _versions() -> list[str]:
    packages = ("triton", "transformers", "accelerate", "datasets", "peft")
    return [
        f"wrpo          {__version__}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, {_accelerator()}",
        *(f"{name:<13} {_version_of(name)}" for name in packages),
        f"processor     {_processor()}, {os.cpu_count()} cores",
        f"budget        {DEFAULT_BUDGET >> 20} MiB of logits at a time, on an accelerator 1/{SHARE_OF_ACCELERATOR} of "
        f"its memory up to {MOST_OF_ACCELERATOR >> 20}, unless budget_bytes says otherwise",
    ]


def _native() -> list[str]:
    module, reason = load_extension("_cpu")
    if module is None:
        return [f"native        no: {reason}"]
    features = ", ".join(f"{name} {value}" for name, value in module.features().items())
    form = "delta^T h with delta transposed first" if prefers_transposed() else "as they stand"
    if not multiplies_fast(torch.bfloat16):
        form = "widened to float32, since this CPU has no such products"
    wide = "our own, faster than torch's on this processor" if prefers_own() else "torch's"
    return [f"native        {features}", f"products      float32 on the CPU: {wide}; bfloat16: {form}"]


def _cuda() -> list[str]:
    module, reason = load_extension("_cuda")
    if module is None:
        return [f"cuda          no: {reason}"]
    version, archs = module.runtime_version(), ", ".join(f"sm_{arch}" for arch in module.archs())
    trouble = cuda_launch.unusable()
    state = f"{module.device_count()} devices" if trouble is None else trouble
    return [f"cuda          runtime {version // 1000}.{version % 1000 // 10} for {archs}; {state}"]


def _backends() -> list[str]:
    """For each row op, device and type: the backend that runs, and the reason of each that does not."""
    lines = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    ops = (("token_logp", token_contract, torch.bfloat16), ("preference_loss", preference_contract, torch.float32))
    for op, contract, dtype in ops:
        for device in devices:
            probe = torch.empty(1, 1, dtype=dtype, device=device)
            answers = [(module.NAME, why_not(module, probe)) for module in contract.CANDIDATES]
            chosen = next(name for name, reason in answers if reason is None)
            lines.append(f"{op:<16} {device:<5} runs {chosen}")
            lines += [f"{'':<16} {'':<5} not {name}: {reason}" for name, reason in answers if reason is not None]
    lines.append("linear_token_logp and linear_preference_loss run matrix products around these;")
    lines.append('linear_token_logp has a product that writes no logits: backend="triton_fused", where it is named;')
    lines.append(
        'both have one that leaves powers of the scores, in bfloat16: backend="triton_exp", see docs/triton.md.'
    )
    return lines


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
