"""What an import does: no more than it says, and the same library when the native module is absent or broken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import openmp
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

# An editable install would find the checkout's native module for a copy that has none.
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
"""


# One process says it all of one state: what computes, what is refused, what is reported, each behind a line of its own.
EVERYTHING = f"""
{COMPUTE}
print("== refusal")
try:
    wrpo_kernels.token_logp(logits, target, backend="native")
except RuntimeError as error:
    print(error)
print("== report")
import runpy
runpy.run_module("wrpo_kernels", run_name="__main__")
"""


class Said(NamedTuple):
    computing: str
    refusal: str
    report: str
    errors: str


def python(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def said_in(folder: Path, before: str = "") -> Said:
    done = python(ALONE + before + EVERYTHING, cwd=folder)
    return Said(*re.split(r"== \w+\n", done.stdout), done.stderr)


def copied(folder: Path) -> Path:
    """A folder that holds `wrpo_kernels` alone, without its native module; Python started there finds it first."""
    shutil.copytree(PACKAGE, folder / "wrpo_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def without_module(tmp_path_factory) -> Said:
    return said_in(copied(tmp_path_factory.mktemp("absent")), "import warnings; warnings.simplefilter('error')\n")


@pytest.fixture(scope="module")
def with_broken_module(tmp_path_factory) -> Said:
    folder = copied(tmp_path_factory.mktemp("broken"))
    (folder / "wrpo_kernels" / f"_cpu{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    return said_in(folder)


def test_the_library_works_alone_without_its_native_module_and_without_a_word(without_module):
    assert without_module.computing == without_module.errors == ""


def test_without_the_native_module_asking_for_it_says_how_it_came(without_module):
    assert "wrpo_kernels._cpu was not built" in without_module.refusal


def test_a_native_module_that_does_not_load_warns_once_with_the_cause_and_the_reference_runs(with_broken_module):
    errors = with_broken_module.errors
    assert errors.count("RuntimeWarning: wrpo_kernels._cpu is installed but does not load") == 1
    assert f"_cpu{EXTENSION_SUFFIXES[0]}" in errors  # the loader's own words


def test_a_native_module_that_does_not_load_is_an_error_where_it_was_named(with_broken_module):
    assert (
        "backend='native' cannot do this call: wrpo_kernels._cpu is installed but does not load"
        in with_broken_module.refusal
    )


def test_the_report_tells_the_same(without_module, with_broken_module):
    assert "not native: wrpo_kernels._cpu was not built" in without_module.report
    assert "not native: wrpo_kernels._cpu is installed but does not load" in with_broken_module.report


class Traces(NamedTuple):
    """What stayed in the process: modules after the import, modules after calls too, settings of torch changed, and the
    files of OpenMP."""

    imported: list[str]
    computed: list[str]
    is_changed: bool
    openmp: list[str]


@pytest.fixture(scope="module")
def traces() -> Traces:
    done = python(
        "import sys, torch, json; before = set(sys.modules)\n"
        "def settings():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),\n"
        "            torch.initial_seed(), torch.get_rng_state().sum().item())\n"
        "torch.manual_seed(7); old = settings()\n"
        "import wrpo_kernels\n"
        "imported = sorted(set(sys.modules) - before)\n"
        + COMPUTE.replace("randn", "ones")
        + "print(json.dumps([imported, sorted(set(sys.modules) - before), settings() != old,\n"
        f"    {openmp.RUNTIMES}]))\n"
    )
    return Traces(*json.loads(done.stdout))


def test_importing_adds_nothing_to_torch_but_ourselves(traces):
    """Not Triton, which takes a second and may be absent; no trainer, no data library."""
    roots = {name.split(".")[0] for name in traces.imported}
    assert "wrpo_kernels" in roots
    assert not roots - set(sys.stdlib_module_names) - {"wrpo_kernels", "torch"}


def test_on_the_cpu_nothing_is_compiled_for_a_new_shape(traces):
    """No compiler is even loaded: not Triton's, not torch's own."""
    compilers = ("triton", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")
    assert "wrpo_kernels" in traces.computed
    assert not [name for name in traces.computed if name.startswith(compilers)]


def test_importing_leaves_the_settings_of_torch_alone(traces):
    assert not traces.is_changed


def test_the_native_module_computes_with_the_openmp_runtime_of_torch(traces):
    """Built with the flags that ship."""
    pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built")
    assert "wrpo_kernels._cpu" in traces.computed
    assert len(traces.openmp) <= 1


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
