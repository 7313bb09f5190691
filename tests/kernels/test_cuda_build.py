"""The CUDA kernels compiled for every generation of devices, without one: what they use, and that nothing spills.

python tests/kernels/test_cuda_build.py          writes tests/kernels/kernel_resources_cuda.json anew

The compiler takes minutes, so it runs only where sources, flags or the compiler are others than the table's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = Path(__file__).with_name("kernel_resources_cuda.json")
ARCHS = ("80", "90", "100", "120")
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
# Of -Xptxas -v, for each kernel.
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def flags() -> list[str]:
    """Those of setup.py, so that what is counted is what is shipped."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no NVCC_FLAGS")


def release() -> str | None:
    try:
        shown = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return re.search(r"release ([\d.]+)", shown)[1]


def inputs() -> str:
    """One number for all that the machine code depends on."""
    files = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")])
    text = b"".join(path.read_bytes() for path in files) + repr((flags(), ARCHS, release())).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def short(mangled: str) -> str:
    """token_logp_kernel<true, Scores<BFloat16, false>> for what the compiler calls it."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"wrpo::(cuda::)?|\(anonymous namespace\)::|^void ", "", name).replace("> >", ">>")
    return name[: name.rindex("(")]


def resources() -> dict[str, dict[str, list[int]]]:
    """kernel -> "sm_90" -> [registers, bytes of static shared memory, of stack, of spills]"""
    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    shipped = flags()  # once, before the threads: ast.parse of two threads at a time fails on Python 3.11

    def report(job: tuple[str, str]) -> str:
        source, arch = job
        command = ["nvcc", *shipped, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", source, "-o", "/dev/null"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(report, jobs))
    found: dict[str, dict[str, list[int]]] = {}
    for (_, arch), text in zip(jobs, reports, strict=True):
        for match in REPORT.finditer(text):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            row = [int(match["registers"]), int(shared[1]) if shared else 0, int(match["stack"])]
            row.append(int(match["stores"]) + int(match["loads"]))
            found.setdefault(short(match["kernel"]), {})[f"sm_{arch}"] = row
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, list[int]]]:
    if release() is None:
        pytest.skip("compiling the CUDA kernels needs nvcc, and it was not found")
    table = json.loads(TABLE.read_text())
    return table["kernels"] if table["inputs"] == inputs() else resources()


@pytest.mark.slow
def test_every_kernel_compiles_for_every_generation_and_nothing_spills(compiled):
    assert set(compiled) == set(json.loads(TABLE.read_text())["kernels"])
    for kernel, by_arch in compiled.items():
        assert set(by_arch) == {f"sm_{arch}" for arch in ARCHS}, kernel
        for arch, (_, _, stack, spills) in by_arch.items():
            assert (stack, spills) == (0, 0), f"{kernel} on {arch}: {stack} bytes of stack, {spills} of spills"


@pytest.mark.slow
def test_two_blocks_of_a_row_kernel_fit_a_multiprocessor(compiled):
    """Where one reads while the other writes: 2 x 512 threads share 65536 registers."""
    for kernel, by_arch in compiled.items():
        if kernel.startswith("token_"):
            for arch, (registers, *_) in by_arch.items():
                assert 2 * 512 * registers <= 65536, f"{kernel} on {arch}: {registers} registers"


@pytest.mark.slow
def test_registers_and_shared_memory_are_those_of_the_table(compiled):
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != release():
        pytest.skip(
            f"the table was written by nvcc {table['nvcc']}, this is {release()}: it counts registers otherwise"
        )
    for kernel, by_arch in compiled.items():
        for arch, row in by_arch.items():
            assert row == table["kernels"][kernel][arch], (
                f"{kernel} on {arch}: [registers, shared, stack, spills] {row}, not {table['kernels'][kernel][arch]}; "
                "if that is meant, run python tests/kernels/test_cuda_build.py"
            )


def main() -> None:
    lines = [f'    "{kernel}": {json.dumps(by_arch)}' for kernel, by_arch in resources().items()]
    head = f'  "columns": ["registers", "shared memory", "stack", "spills"],\n  "nvcc": "{release()}",\n'
    head += f'  "inputs": "{inputs()}",\n'
    TABLE.write_text("{\n" + head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    sys.exit(main())
