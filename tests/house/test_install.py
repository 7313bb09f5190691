"""What lands on a user's machine: wheels built without torch, with and without a compiler, and what they do there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import ninja
import openmp
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LEFTOVERS = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
COMPUTE = """
import sys
# An editable install of the checkout would lend its native module to a wheel that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, wrpo_kernels
print(wrpo_kernels.__file__)
logits, target = torch.randn(5, 1009), torch.arange(5)
got = wrpo_kernels.token_logp(logits, target, backend={backend!r})
torch.testing.assert_close(got, logits.log_softmax(-1)[target, target])
"""
ASK_FOR_NATIVE = """
try:
    wrpo_kernels.token_logp(logits, target, backend="native")
except RuntimeError as error:
    print("refused:", error)
"""
ASK_OF_CUDA = """
from wrpo_kernels import _cuda
from wrpo_kernels.dispatch import cuda_launch
print(_cuda.archs(), cuda_launch.unusable())
"""

pytestmark = pytest.mark.slow


def quick_flags(compiler: str) -> str:
    """To compile without optimising: what comes of it is tested with the flags that ship."""
    if not compiler.endswith("nvcc"):
        return "-O0"
    known = subprocess.run([compiler, "--help"], capture_output=True, text=True).stdout
    return "-Ofc=max" if "--Ofast-compile" in known else "-Xptxas=-O0 -Xcicc=-O0"


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory) -> dict[str, str]:
    """Where importing torch fails, and compilers are quick."""
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "torch.py").write_text("raise ImportError('the build must not import torch')")
    here = {"PYTHONPATH": str(folder)}
    for variable, name in {"CC": "gcc", "CXX": "g++", "CUDACXX": "nvcc"}.items():
        program = shutil.which(os.environ.get(variable, name))
        if program is not None:
            (folder / name).write_text(f'#!/bin/sh\nexec {program} "$@" {quick_flags(program)}\n')
            (folder / name).chmod(0o755)
            here[variable] = str(folder / name)
    return {**os.environ, **here}


@pytest.fixture(scope="module")
def build(tmp_path_factory, surroundings):
    """Builds a wheel of a copy of the sources."""

    def run(source: Path | None = None, **variables: str) -> tuple[subprocess.CompletedProcess, Path]:
        """`source`: the copy of an earlier build, whose objects are used again. Default: a fresh one."""
        if source is None:
            source = tmp_path_factory.mktemp("source") / "wrpo"
            shutil.copytree(ROOT, source, ignore=LEFTOVERS)
        for stale in source.glob("build/lib*"):
            shutil.rmtree(stale)  # a module of the build before would travel along
        wheels = tmp_path_factory.mktemp("wheels")
        options = ["--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels]
        command = [sys.executable, "-m", "pip", "wheel", *options, "."]
        environment = surroundings | variables
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True), wheels

    return run


@pytest.fixture
def build_module(tmp_path, surroundings):
    """What pip has the sources do for their native modules, without the rest of a wheel."""

    def run(**variables: str) -> subprocess.CompletedProcess:
        shutil.copytree(ROOT, tmp_path / "wrpo", ignore=LEFTOVERS)
        command = [sys.executable, "setup.py", "build_ext"]
        environment = surroundings | variables
        return subprocess.run(command, cwd=tmp_path / "wrpo", env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def built_source(tmp_path_factory):
    source = tmp_path_factory.mktemp("built") / "wrpo"
    shutil.copytree(ROOT, source, ignore=LEFTOVERS)
    return source


@pytest.fixture(scope="module")
def native_wheel(build, built_source):
    done, wheels = build(built_source, WRPO_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(wheels.glob("*.whl"))


@pytest.fixture(scope="module")
def cuda_wheel(build, built_source, native_wheel):
    if shutil.which("nvcc") is None:
        pytest.skip("a wheel with CUDA kernels needs nvcc, and it was not found")
    done, wheels = build(built_source, WRPO_BUILD="cuda", WRPO_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


def compute(wheel: Path, backend: str, then: str = "") -> str:
    """Unpacks the wheel into a folder of its own and computes there, away from the sources; what `then` prints."""
    target = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE.format(backend=backend) + then],
        cwd=wheel.parent,
        env={**os.environ, "PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, _, printed = done.stdout.partition("\n")
    assert where.startswith(str(target)), "another installation answered"
    return printed


def lines_of_setup(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in map(str.strip, (done.stdout + done.stderr).splitlines()) if line.startswith("wrpo:")]


def test_a_wheel_built_without_torch_computes_with_its_native_module_and_one_openmp_runtime(native_wheel):
    assert len(eval(compute(native_wheel, backend="native", then=f"print({openmp.RUNTIMES})"))) <= 1


def test_a_second_build_compiles_nothing_and_plans_what_a_change_reaches(native_wheel, built_source, surroundings):
    def compiled(command: list[str]) -> set[str]:
        environment = surroundings | {"WRPO_BUILD": "cpu"}
        done = subprocess.run(command, cwd=built_source, env=environment, capture_output=True, text=True, check=True)
        return set(re.findall(r"compiling \S+/(\w+\.cpp) into", done.stdout + done.stderr))

    assert compiled([sys.executable, "setup.py", "build_ext"]) == set()
    changed = [built_source / "csrc/preference_terms.h", built_source / "csrc/cpu/transpose.cpp"]
    before = [path.stat() for path in changed]
    for path in changed:
        path.touch()
    (plan,) = built_source.glob("build/temp*/wrpo_kernels._cpu")
    reached = compiled([f"{ninja.BIN_DIR}/ninja", "-C", str(plan), "-n"])  # says what it would compile
    for path, was in zip(changed, before, strict=True):
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # the builds below compile nothing again
    assert reached == {"preference_loss.cpp", "bindings.cpp", "transpose.cpp"}


def test_a_wheel_with_cuda_kernels_computes_on_the_cpu_and_says_what_the_gpu_lacks(cuda_wheel):
    """Built without torch, GPU and driver; it loads where there is none of CUDA."""
    held = zipfile.ZipFile(cuda_wheel).namelist()
    assert {name.partition(".")[0] for name in held if name.endswith(".so")} == {
        "wrpo_kernels/_cpu",
        "wrpo_kernels/_cuda",
    }
    assert re.match(r"\[90\] .*(driver|device)", compute(cuda_wheel, backend="native", then=ASK_OF_CUDA))


def test_a_wheel_holds_every_package_and_the_demo_data(native_wheel):
    expected = {
        str(path.relative_to(ROOT))
        for package in ("wrpo", "wrpo_kernels")
        for pattern in ("*.py", "*.jsonl")
        for path in (ROOT / package).rglob(pattern)
    }
    held = set(zipfile.ZipFile(native_wheel).namelist())
    assert expected - held == set()
    assert any(name.startswith("wrpo_kernels/_cpu.") for name in held)


def test_a_pure_python_wheel_computes_and_says_why_native_cannot(build):
    done, wheels = build(WRPO_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    refused = compute(next(wheels.glob("*-none-any.whl")), backend="reference", then=ASK_FOR_NATIVE)
    assert re.match("refused: .*was not built", refused, re.DOTALL)


def test_a_broken_compiler_gives_a_working_install_and_one_clear_line(build):
    done, wheels = build(CC="false", CXX="false", CUDACXX="false")  # a working nvcc would compile for nothing
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines_of_setup(done)
    assert "pure Python" in line
    compute(next(wheels.glob("*.whl")), backend="reference")


def test_without_nvcc_the_cpu_module_is_built_and_one_line_says_so(build, built_source, native_wheel, tmp_path):
    shim = tmp_path / "nvcc"  # as left behind by a toolkit that is gone
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    done, wheels = build(built_source, CUDACXX=str(shim))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines_of_setup(done)
    assert "built wrpo_kernels._cpu" in line
    assert f"no GPU kernels: wrpo_kernels._cuda could not be built ({shim} was not found, or has no toolkit)" in line
    held = zipfile.ZipFile(next(wheels.glob("*.whl"))).namelist()
    assert [name.partition(".")[0] for name in held if name.endswith(".so")] == ["wrpo_kernels/_cpu"]


def test_a_cuda_build_asked_for_by_name_fails_without_nvcc(build_module):
    done = build_module(WRPO_BUILD="cuda", CUDACXX="false", CXX="true")
    assert done.returncode != 0
    assert "WRPO_BUILD=cuda" in done.stdout + done.stderr


def test_an_architecture_that_nvcc_does_not_know_is_an_error_that_lists_the_known_ones(build_module):
    if shutil.which("nvcc") is None:
        pytest.skip("only nvcc knows its architectures, and it was not found")
    done = build_module(WRPO_BUILD="cuda", WRPO_CUDA_ARCHS="90;7", CXX="true")
    assert done.returncode != 0
    assert re.search(r"WRPO_CUDA_ARCHS: .*'90'.*got \['90', '7'\]", done.stdout + done.stderr)


def test_a_native_build_asked_for_by_name_fails_without_a_compiler(build_module):
    done = build_module(WRPO_BUILD="cpu", CC="false", CXX="false")
    assert done.returncode != 0


def test_an_unknown_build_is_an_error_that_names_the_choices(build_module):
    done = build_module(WRPO_BUILD="gpu")
    assert done.returncode != 0
    assert all(word in done.stdout + done.stderr for word in ("WRPO_BUILD", "none", "cpu", "cuda", "gpu"))


def test_a_source_distribution_holds_what_its_build_needs(tmp_path):
    source = tmp_path / "wrpo"
    shutil.copytree(ROOT, source, ignore=LEFTOVERS)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('out'))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next((source / "out").iterdir())) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert (needed | {"setup.py", "LICENSE", "README.md"}) - held == set()
