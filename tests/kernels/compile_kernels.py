"""python tests/kernels/compile_kernels.py [--write]: compiles every Triton kernel for GPUs that are not here.

The launchers run on CPU tensors with the launch itself replaced: what would have been launched (types, alignment,
constants, warps) is compiled instead. Registers, stack, spills and shared memory are read from the machine code.
Prints them as JSON; `--write` makes them the table that tests/kernels/test_offline_compile.py compares with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: the compiler, not the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from wrpo_kernels.linear_token_statistics import triton_kernel as token_statistics
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.lm_head import scaling_kernel as scaling
from wrpo_kernels.lm_head import triton_kernel as linear_token_logp
from wrpo_kernels.lm_head.exp_product import form
from wrpo_kernels.lm_head.exp_product import launch as exp_product
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss import triton_kernel as preference_loss
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences
from wrpo_kernels.token_logp import triton_kernel as token_logp

TABLE = Path(__file__).with_name("kernel_resources.json")
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
BF16, FP32 = torch.bfloat16, torch.float32
ALL, ENTROPY = Wanted(True, True, True, True), Wanted(True, False, False, False)


class Launch:
    """A kernel and the arguments it was launched with."""

    def __init__(self, kernel: JITFunction, positional: tuple, named: dict) -> None:
        self.kernel = kernel
        self.arguments = dict(zip(kernel.arg_names, positional, strict=False))
        self.arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        self.options = {name: value for name, value in named.items() if name not in kernel.arg_names}

    def source(self) -> ASTSource:
        types, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                types[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            types[parameter.name] = type_of(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, types, constants, attributes)


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{[*value.block_shape]}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    before = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **named: launches.append(Launch(kernel, args, named))
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = before


def row_problem(dtype: torch.dtype, vocabulary: int, capped: bool) -> tuple[tuple, LogitTransform]:
    logits, target = torch.zeros(2, vocabulary, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    bias = torch.zeros(vocabulary, dtype=dtype) if capped else None
    return (logits, target, -100), LogitTransform(bias, 1.3, 30.0 * capped, 0.7)


def row_launch(entry: str, dtype: torch.dtype, vocabulary: int = 128256, capped: bool = False) -> Callable[[], object]:
    def launch():
        (logits, *rest), transform = row_problem(dtype, vocabulary, capped)
        row, halves = torch.zeros(2), torch.zeros(2, 2)
        if entry == "grad":
            token_logp.grad(logits, *rest, transform, row, halves, row, torch.empty_like(logits))
        else:
            getattr(token_logp, entry)(logits, *rest, transform, row, halves)

    return launch


def statistics_launch(
    entry: str, dtype: torch.dtype, vocabulary: int = 128256, capped: bool = False, wanted: Wanted = ALL
) -> Callable[[], object]:
    def launch():
        told, transform = row_problem(dtype, vocabulary, capped)
        values, top1 = torch.zeros(2, len(COLUMNS)), torch.zeros(2, dtype=torch.int64)
        getattr(token_statistics, entry)(*told, transform, wanted, values, top1 if entry == "statistics" else values)

    return launch


def preference_launch(loss_type: str, with_all: bool) -> Callable[[], object]:
    def launch():
        s, g, count = torch.zeros(6), torch.zeros(2), torch.ones(6, dtype=torch.int64)
        rest = (s, g, g, g) if with_all else (None,) * 4
        ref_logp = s if with_all else None
        family = Family(0.1, 0.2, loss_type, 0.1 if loss_type == "exo_pair" else 0.0, 0.05, with_all)
        sequences = Sequences(ref_logp, s, count, count, *rest)
        preference_loss.forward(s, LossArguments(sequences, 2, family))

    return launch


def sequence_launch(entry: str) -> Callable[[], object]:
    arguments = {"sequence_sum": (torch.zeros(5), torch.ones(5, dtype=torch.int64))}
    arguments["over_rows"] = (*arguments["sequence_sum"], 5)
    return lambda: getattr(preference_loss, entry)(*arguments[entry])


def fused_launch(dtype: torch.dtype, large: bool, capped: bool = False) -> Callable[[], object]:
    def launch():
        vocabulary, width = 1024, 4096
        bias = torch.zeros(vocabulary, dtype=dtype) if capped else None
        transform = LogitTransform(bias, 1.3, 30.0 * capped, 0.7)
        tensors = torch.zeros(3, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
        before, linear_token_logp.has_large_memory = linear_token_logp.has_large_memory, lambda tensor: large
        linear_token_logp.logp_of_hidden(*tensors, torch.zeros(3).long(), -100, transform, torch.zeros(3))
        linear_token_logp.has_large_memory = before

    return launch


def scaling_launch(entry: str, has_index: bool) -> Callable[[], object]:
    rows, out = torch.zeros(4, 576, dtype=BF16), torch.zeros(3, 576, dtype=BF16)
    index, coef = torch.zeros(3, dtype=torch.int64) if has_index else None, torch.zeros(3, 1)
    calls = {
        "gather_rows": lambda: scaling.gather_rows(rows, index, coef, out),
        "scatter_rows": lambda: scaling.scatter_rows(out, index, coef, rows),
        "scale": lambda: scaling.scale(torch.zeros(4, 576), torch.zeros(()), rows),
        "compact": lambda: scaling.compact(torch.zeros(4).long(), -100, torch.zeros(3).long(), torch.zeros(3).long()),
    }
    return calls[entry]


LARGE_MEMORY = ("sm_90", "sm_100")
LAUNCHES = {
    "token_logp forward bf16": row_launch("forward", BF16),
    "token_logp forward fp32": row_launch("forward", FP32),
    "token_logp forward bf16, bias and softcap": row_launch("forward", BF16, capped=True),
    "token_logp forward bf16, odd vocabulary": row_launch("forward", BF16, 50257),
    "token_logp delta bf16": row_launch("delta_", BF16),
    "token_logp delta fp32": row_launch("delta_", FP32),
    "token_logp delta bf16, bias and softcap": row_launch("delta_", BF16, capped=True),
    "token_logp delta fp32, bias and softcap": row_launch("delta_", FP32, capped=True),
    "token_logp delta bf16, odd vocabulary": row_launch("delta_", BF16, 50257),
    "token_logp delta fp32, odd, bias and softcap": row_launch("delta_", FP32, 50257, capped=True),
    "token_logp gradient bf16, bias and softcap": row_launch("grad", BF16, capped=True),
    "token_logp gradient fp32": row_launch("grad", FP32),
    "token_statistics forward bf16, entropy": statistics_launch("statistics", BF16, wanted=ENTROPY),
    "token_statistics forward bf16": statistics_launch("statistics", BF16),
    "token_statistics forward fp32, odd, bias and softcap": statistics_launch("statistics", FP32, 50257, capped=True),
    "token_statistics gradient bf16, bias and softcap": statistics_launch("grad_", BF16, capped=True),
    "token_statistics gradient fp32": statistics_launch("grad_", FP32),
    "preference_loss sigmoid, all weights": preference_launch("sigmoid", True),
    "preference_loss ipo": preference_launch("ipo", False),
    "preference_loss exo_pair": preference_launch("exo_pair", False),
    "preference_loss discopop": preference_launch("discopop", True),
    "preference_loss kto": preference_launch("kto", False),
    "preference_loss sums of sequences": sequence_launch("sequence_sum"),
    "preference_loss coefficients of rows": sequence_launch("over_rows"),
    "linear_token_logp bf16, large memory": fused_launch(BF16, True),
    "linear_token_logp bf16, bias and softcap, large memory": fused_launch(BF16, True, capped=True),
    "linear_token_logp bf16, small memory": fused_launch(BF16, False),
    "linear_token_logp bf16, bias and softcap, small memory": fused_launch(BF16, False, capped=True),
    "linear_token_logp fp32": fused_launch(FP32, False),
    "rows gathered and scaled": scaling_launch("gather_rows", True),
    "rows scaled and scattered": scaling_launch("scatter_rows", True),
    "rows scaled where they are": scaling_launch("scatter_rows", False),
    "total scaled and rounded": scaling_launch("scale", False),
    "labels that count": scaling_launch("compact", False),
}


def cuda_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(CUOBJDUMP, "--dump-resource-usage", file.name)
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
        # What a thread spills lies on its stack. To disassemble takes 0.3 s a kernel, so only those that have one.
        code = run(CUOBJDUMP, "--dump-sass", file.name) if found["STACK"] else ""
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "spills": spills}


def hip_resources(code: str) -> dict[str, int]:
    fields = {
        "registers": "vgpr_count",
        "stack": "private_segment_fixed_size",
        "shared": "group_segment_fixed_size",
        "spills": "vgpr_spill_count",
    }
    return {name: int(re.search(rf"\.{field}:\s+(\d+)", code)[1]) for name, field in fields.items()}


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def targets_of(name: str) -> dict[str, GPUTarget]:
    """Those that the launcher would choose this shape for."""
    size = name.rpartition(", ")[2]
    if size not in ("large memory", "small memory"):
        return TARGETS
    return {target: gpu for target, gpu in TARGETS.items() if (target in LARGE_MEMORY) == (size == "large memory")}


def resources() -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name, launch in LAUNCHES.items():
        with recorded() as launches:
            launch()
        for number, one in enumerate(launches):
            row = table.setdefault(name if len(launches) == 1 else f"{name}, launch {number + 1}", {})
            row.update((target, built(one, gpu)) for target, gpu in targets_of(name).items())
    for target in EXP_TARGETS:
        for name, one in exp_launches(target).items():
            table.setdefault(name, {})[target] = built(one, TARGETS[target])
    return table


def built(launch: Launch, gpu: GPUTarget) -> dict[str, int]:
    code = triton.compile(launch.source(), target=gpu, options=launch.options)
    found = cuda_resources(code.asm["cubin"]) if gpu.backend == "cuda" else hip_resources(code.asm["amdgcn"])
    return found | {"shared": code.metadata.shared}  # what the launch asks for, beside what is static


EXP_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def exp_launches(target: str) -> dict[str, Launch]:
    """The kernels of `exp_product` in the tiles that the table has for this target: all with every transform and an
    adapter, the product also without."""
    before, form.architecture = form.architecture, lambda device: target
    with recorded() as plain:
        exp_delta(with_all=False)
    with recorded() as launches:
        exp_delta(with_all=True)
    form.architecture = before
    found = {f"exp_product {one.kernel.__name__}, every transform": one for one in launches}
    return found | {f"exp_product {one.kernel.__name__}": one for one in plain if "_product_" in one.kernel.__name__}


def exp_delta(with_all: bool) -> None:
    rows, vocabulary, width, rank = 256, 1024, 4096, 16
    transform = LogitTransform(torch.zeros(vocabulary, dtype=BF16) if with_all else None, 1.3, 30.0 * with_all, 0.7)
    shapes = [(rows, width), (vocabulary, width)] + [(rows, rank), (vocabulary, rank)] * with_all
    operands = [torch.zeros(*shape, dtype=BF16) for shape in shapes]
    out = torch.zeros(rows, vocabulary, dtype=BF16)
    exp_product.delta_of_hidden(tuple(operands), torch.zeros(rows).long(), -100, transform, torch.zeros(rows), out)
    exp_product.coefficients(torch.zeros(rows, 1), torch.zeros(rows), transform.slope)


if __name__ == "__main__":
    result = {"triton": triton.__version__, "kernels": resources()}
    text = json.dumps(result, indent=1)
    # One line a kernel and target: a change shows as one line of a diff.
    text = re.sub(r"\{[^{}]*\}", lambda innermost: re.sub(r"\s+", " ", innermost[0]), text)
    print(text)
    if "--write" in sys.argv:
        TABLE.write_text(text + "\n")
