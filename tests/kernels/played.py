"""The CUDA backend on the CPU: its own bindings and kernel bodies, every block played on the host."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from wrpo_kernels.dispatch import cuda_launch

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off".split()
UNITS = {
    "tests/kernels/played_launches.cpp": ["-O2"],
    "csrc/cuda/bindings.cpp": ["-O0", '-DWRPO_CUDA_ARCHS="80"'],
}


def module() -> ModuleType:
    """The module `_cuda` with played launches, from build/; skips the test where no compiler is found.

    Compiled once for these sources, flags and compiler, by one process while the others wait for it: 16 s of a core.
    """
    compiler = os.environ.get("CXX", "g++")
    pybind11 = pytest.importorskip("pybind11", reason="playing the CUDA kernels needs pybind11")
    if shutil.which(compiler) is None:
        pytest.skip(f"playing the CUDA kernels on the host needs a C++ compiler, and {compiler} was not found")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    release = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    folder = ROOT / "build" / "played" / digest(release, pybind11.__version__, sys.version, *include)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(library, compiler, include)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(*words: str) -> str:
    """Of all that the module is made from."""
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "tests/kernels").glob("*.cpp"), Path(__file__)]
    found = hashlib.sha256(repr(words).encode())
    for path in sorted(path for path in sources if path.is_file()):
        found.update(repr((str(path), path.read_bytes())).encode())
    return found.hexdigest()[:16]


def build(library: Path, compiler: str, include: list[str]) -> None:
    objects = [str(library.with_name(f"{Path(source).stem}.o")) for source in UNITS]
    running = [
        subprocess.Popen([compiler, *FLAGS, *flags, *include, "-c", str(ROOT / source), "-o", name])
        for (source, flags), name in zip(UNITS.items(), objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    linked = library.with_suffix(".linked")
    subprocess.run([compiler, "-shared", *objects, "-o", str(linked)], check=True)
    linked.rename(library)


def use(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, the CUDA backend takes CPU tensors and plays its kernels."""

    def launch(kernel: str, on: Tensor, *arguments: object) -> None:
        addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in arguments]
        getattr(module, kernel)(*addresses, 0, 0)

    monkeypatch.setattr(cuda_launch, "refuses", lambda tensor: None)
    monkeypatch.setattr(cuda_launch, "launch", launch)
