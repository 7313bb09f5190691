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

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LEFTOVERS = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
COMPUTE = """
import sys
# An editable install of the checkout would lend its native module to a wheel that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, wrpo_kernels
logits, target = torch.randn(5, 1009), torch.arange(5)
got = wrpo_kernels.token_logp(logits, target, backend={backend!r})
torch.testing.assert_close(got, logits.log_softmax(-1)[target, target])
print(wrpo_kernels.__file__)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory) -> dict[str, str]:
    """Where importing torch fails, and compilers do not optimise: what they make is tested with the flags that ship."""
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "torch.py").write_text("raise ImportError('the build must not import torch')")
    compilers = {"CC": ("gcc", "-O0"), "CXX": ("g++", "-O0"), "CUDACXX": ("nvcc", "-Xptxas=-O0 -Xcicc=-O0")}
    for variable, (name, flags) in compilers.items():
        program = shutil.which(os.environ.get(variable, name))
        if program is not None:
            (folder / name).write_text(f'#!/bin/sh\nexec {program} "$@" {flags}\n')
            (folder / name).chmod(0o755)
    here = {variable: str(folder / name) for variable, (name, _) in compilers.items() if (folder / name).exists()}
    return {**os.environ, "PYTHONPATH": str(folder), **here}


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


def compute(wheel: Path, backend: str) -> subprocess.CompletedProcess:
    """Unpacks the wheel into a folder of its own and computes there, away from the sources."""
    target = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE.format(backend=backend)],
        cwd=wheel.parent,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 or done.stdout.startswith(str(target)), "another installation answered"
    return done


def lines_of_setup(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in map(str.strip, (done.stdout + done.stderr).splitlines()) if line.startswith("wrpo:")]


def test_a_wheel_built_without_torch_computes_with_its_native_module(native_wheel):
    done = compute(native_wheel, backend="native")
    assert done.returncode == 0, done.stderr


def test_a_second_build_compiles_only_what_a_change_reaches(native_wheel, built_source, surroundings):

    def compiled() -> set[str]:
        command = [sys.executable, "setup.py", "build_ext"]
        environment = surroundings | {"WRPO_BUILD": "cpu"}
        done = subprocess.run(command, cwd=built_source, env=environment, capture_output=True, text=True, check=True)
        return set(re.findall(r"compiling \S+/(\w+\.cpp) into", done.stdout + done.stderr))

    assert compiled() == set()
    (built_source / "csrc/preference_terms.h").touch()
    (built_source / "csrc/cpu/transpose.cpp").touch()
    assert compiled() == {"preference_loss.cpp", "bindings.cpp", "transpose.cpp"}


def test_a_wheel_with_cuda_kernels_computes_on_the_cpu_and_says_what_the_gpu_lacks(cuda_wheel):
    """Built without torch, GPU and driver; it loads where there is none of CUDA."""
    held = zipfile.ZipFile(cuda_wheel).namelist()
    assert {name.partition(".")[0] for name in held if name.endswith(".so")} == {
        "wrpo_kernels/_cpu",
        "wrpo_kernels/_cuda",
    }
    done = compute(cuda_wheel, backend="native")
    assert done.returncode == 0, done.stderr
    code = "from wrpo_kernels import _cuda; from wrpo_kernels.dispatch import cuda_launch\n"
    code += "print(_cuda.archs(), cuda_launch.unusable())"
    environment = {**os.environ, "PYTHONPATH": str(cuda_wheel.parent / "installed"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cuda_wheel.parent, env=environment, capture_output=True, text=True
    )
    assert re.match(r"\[90\] .*(driver|device)", done.stdout), done.stdout + done.stderr


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
    wheel = next(wheels.glob("*-none-any.whl"))
    assert compute(wheel, backend="reference").returncode == 0
    refused = compute(wheel, backend="native")
    assert refused.returncode != 0
    assert "was not built" in refused.stderr


def test_a_broken_compiler_gives_a_working_install_and_one_clear_line(build):
    done, wheels = build(CC="false", CXX="false", CUDACXX="false")  # a working nvcc would compile for nothing
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines_of_setup(done)
    assert "pure Python" in line
    assert compute(next(wheels.glob("*.whl")), backend="reference").returncode == 0


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_process_holds_one_openmp_runtime():
    # Two runtimes mean two pools that fight for the cores: torch's own products then run several times slower.
    code = (
        "import wrpo_kernels, torch; from wrpo_kernels.dispatch.backends import load_extension; load_extension('_cpu')"
    )
    code += "\nprint({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(eval(done.stdout)) <= 1
