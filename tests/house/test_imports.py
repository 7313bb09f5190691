"""What an import does: no more than it says, and the same library when the native module is absent or broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import wrpo_kernels

PACKAGE = Path(wrpo_kernels.__file__).parent
COMPUTE = """
import torch, wrpo_kernels
logits, target = torch.randn(5, 1009), torch.arange(5)
logp = wrpo_kernels.token_logp(logits, target)
torch.testing.assert_close(logp, logits.log_softmax(-1)[target, target])
hidden, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
wrpo_kernels.linear_wrpo_loss(hidden, weight, torch.ones(3, 4, dtype=torch.int64), alpha=0.1).loss.backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
"""
NAMED = """
import torch, wrpo_kernels
wrpo_kernels.token_logp(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend="native")
"""


# An editable install would find the checkout's native module for a copy that has none.
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
"""


def python(code: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    code = code if cwd is None else ALONE + code
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that holds `wrpo_kernels` alone, without its native module; Python started there finds it first."""
    shutil.copytree(PACKAGE, tmp_path / "wrpo_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


@pytest.fixture
def broken(copy: Path) -> Path:
    (copy / "wrpo_kernels" / f"_cpu{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    return copy


def test_the_library_works_alone_without_its_native_module_and_without_a_word(copy):
    done = python("import warnings; warnings.simplefilter('error')\n" + COMPUTE, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_without_the_native_module_asking_for_it_says_how_it_came(copy):
    done = python(NAMED, cwd=copy)
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "wrpo_kernels._cpu was not built" in done.stderr


def test_a_native_module_that_does_not_load_warns_once_with_the_cause_and_the_reference_runs(broken):
    done = python(COMPUTE, cwd=broken)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: wrpo_kernels._cpu is installed but does not load") == 1
    assert f"_cpu{EXTENSION_SUFFIXES[0]}" in done.stderr  # the loader's own words


def test_a_native_module_that_does_not_load_is_an_error_where_it_was_named(broken):
    done = python(NAMED, cwd=broken)
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "native: wrpo_kernels._cpu is installed but does not load" in done.stderr


@pytest.mark.parametrize("state", ["absent", "broken"])
def test_the_report_tells_the_same(state, copy, request):
    folder = request.getfixturevalue("broken") if state == "broken" else copy
    done = python("import runpy; runpy.run_module('wrpo_kernels', run_name='__main__')", cwd=folder)
    assert done.returncode == 0, done.stderr
    reason = "was not built" if state == "absent" else "is installed but does not load"
    assert f"not native: wrpo_kernels._cpu {reason}" in done.stdout


def test_importing_adds_nothing_to_torch_but_ourselves():
    """Not Triton, which takes a second and may be absent; no trainer, no data library."""
    done = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import wrpo_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert done.returncode == 0, done.stderr
    strangers = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"wrpo_kernels", "torch"}
    assert not strangers


def test_on_the_cpu_nothing_is_compiled_for_a_new_shape():
    """No compiler is even loaded: not Triton's, not torch's own."""
    done = python(
        "import sys, torch; before = set(sys.modules)\n" + COMPUTE + "print(*sorted(set(sys.modules) - before))"
    )
    assert done.returncode == 0, done.stderr
    compilers = ("triton", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")
    assert not [name for name in done.stdout.split() if name.startswith(compilers)]


def test_importing_leaves_the_settings_of_torch_alone():
    done = python(
        "import torch\n"
        "def settings():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),\n"
        "            torch.initial_seed(), torch.get_rng_state().sum().item())\n"
        "torch.manual_seed(7); before = settings()\n"
        + COMPUTE.replace("randn", "ones")
        + "assert settings() == before\n"
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_no_other_is_exported():
    assert sorted(wrpo_kernels.__all__) == [
        "LikelihoodOutput",
        "PreferenceOutput",
        "TokenStatistics",
        "__version__",
        "dpo_loss",
        "ipo_loss",
        "kto_loss",
        "linear_cross_entropy",
        "linear_dpo_loss",
        "linear_ipo_loss",
        "linear_kto_loss",
        "linear_nll_loss",
        "linear_preference_loss",
        "linear_simpo_loss",
        "linear_token_logp",
        "linear_token_statistics",
        "linear_wrpo_loss",
        "preference_loss",
        "simpo_loss",
        "token_logp",
        "wrpo_loss",
    ]
    for name in wrpo_kernels.__all__:
        assert getattr(wrpo_kernels, name) is not None
