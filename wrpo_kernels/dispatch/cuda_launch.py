"""How the CUDA backends reach their kernels: the compiled module, its reasons not to run, and a launch.

A launch takes the device and the current stream of a tensor, never waits for the device and can be captured in a CUDA
graph. What lies on the device is therefore not checked: a target or a group that is out of range makes NaN of its own
row or sequence. `torch.autograd.set_detect_anomaly(True)` has targets read, and named in the error.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import load_extension


def refuses(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on the device of this tensor; None when they can."""
    if tensor.device.type != "cuda":
        return f"runs on cuda tensors, got {tensor.device}"
    return unusable() or no_code_for(tensor.device.index or 0)


@cache
def unusable() -> str | None:
    """Why no device can run the kernels: not built, no driver, one that is too old, or no device."""
    module, reason = load_extension("_cuda")
    if module is None:
        return reason
    try:
        return None if module.device_count() else "the CUDA driver offers no device"
    except RuntimeError as error:
        return str(error)


@cache
def no_code_for(device: int) -> str | None:
    """Why a device of this number cannot run this build; None when it can."""
    module, _ = load_extension("_cuda")
    archs, capability = module.archs(), module.capability(device)
    # Machine code runs on its own generation from its own number up; PTX of the last one on all that are newer.
    if capability >= archs[-1] or any(capability // 10 == arch // 10 and capability >= arch for arch in archs):
        return None
    return f"was built for sm_{', sm_'.join(map(str, archs))} (WRPO_CUDA_ARCHS), the device is sm_{capability}"


def launch(kernel: str, on: Tensor, *arguments: object) -> None:
    """Queues `kernel` on the device and current stream of `on`; tensors among the arguments go as addresses."""
    module, _ = load_extension("_cuda")
    addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in arguments]
    with torch.cuda.device(on.device):
        getattr(module, kernel)(*addresses, on.device.index, torch.cuda.current_stream(on.device).cuda_stream)
