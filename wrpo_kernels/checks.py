"""Checks whose messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch.compiler import is_compiling

TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float64).max
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got a nested one; use .to_padded_tensor(0)")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor (torch.strided), got {value.layout}; use .to_dense()")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{name} must be a whole tensor, got a DTensor; pass {name}.full_tensor(), or call inside the "
                         "forward of the module that FSDP wraps, which gathers it")  # fmt: skip


def check_shape(name: str, value: Tensor, letters: str, *expected: int) -> None:
    """`letters` is the shape in the project's alphabet, e.g. "[V, D]"; `expected` its values."""
    if value.shape != expected:
        raise ValueError(f"{name} must be {letters} = {list(expected)}, got {list(value.shape)}")


def check_vector(name: str, value: Tensor, letters: str) -> None:
    check_tensor(name, value)
    if value.dim() != 1:
        raise ValueError(f"{name} must be {letters}, got {list(value.shape)}")


def check_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def check_int64(name: str, value: Tensor) -> None:
    if value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {value.dtype}; convert it with {name}.long()")


def int64_labels(name: str, labels: Tensor) -> Tensor:
    """int32 labels widened; those of any other type are left for the checks to refuse."""
    check_tensor(name, labels)
    return labels.long() if labels.dtype == torch.int32 else labels


def check_device(name: str, value: Tensor, like: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {like}, {device}, got {value.device}")


def check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} is a constant of the loss but requires grad; pass {name}.detach()")


def check_number(
    name: str, value: float, *, above: float = -math.inf, least: float = -math.inf, most: float = LARGEST
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{_as_number(name, value)}")
    if not isinstance(value, (int, float)):
        value = float(value)  # numpy's would be compared in its own precision
    if not -LARGEST <= value <= most or value <= above or value < least:  # an int may be beyond float64
        bound = f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
        bound += f" and <= {most:g}" if most < LARGEST else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {_shown(value)}")


def as_float(value: float) -> float:
    """A checked number for a tensor, which takes no int beyond int64. To a compiler a float may be a symbol."""
    return value if isinstance(value, float) else float(value)


def _as_number(name: str, value: object) -> str:
    """What to do with a scalar of torch, which is no number."""
    return f"; pass {name}.item()" if hasattr(value, "item") else ""


def _shown(value: float) -> str:
    """A number for a message; Python refuses to print ints of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def check_float32(name: str, value: float) -> None:
    """A finite number that float32 holds as something else than 0 or infinity, and its reciprocal as well."""
    if value and not TINY <= abs(value) <= 1 / TINY:
        raise ValueError(f"{name} must be within float32, 1.2e-38 to 8.5e37 in size, got {value}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{_as_number(name, value)}")
    if not -(1 << 63) <= value < 1 << 63:  # comparisons alone: to a compiler the number may be a symbol
        raise ValueError(f"{name} must fit int64, got {_shown(value)}")


def check_grad_filter(value: float | None) -> float:
    """The bound as a number; 0 is none."""
    if value is None:
        return 0.0
    check_number("grad_filter", value, above=0.0)
    return float(value)


def check_backend_name(value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend must be the name of a backend or None, got {type(value).__name__}")


def is_readable(value: Tensor) -> bool:
    """Whether to look at the values costs no wait for a device, and no compiler is tracing, which has none."""
    return value.is_cpu and not is_compiling()


def check_labels(name: str, labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Reads every label; positions are those of the flattened argument."""
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}[{position}] (of the flattened tensor) must be in [0, V={vocabulary}) or "
            f"ignore_index={ignore_index}, got {int(labels[position])}"
        )
