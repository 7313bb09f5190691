"""Versions agree, public names explain themselves, and the rules of .pre-commit-config.yaml catch what they forbid."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import wrpo_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FUNCTIONS = [name for name in wrpo_kernels.__all__ if inspect.isfunction(getattr(wrpo_kernels, name))]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
LAWS = {hook["id"]: hook for hook in HOOKS if hook["language"] in ("pygrep", "fail")}


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no released version"
    assert wrpo_kernels.__version__ == PROJECT["project"]["version"] == newest[1]


def test_the_menu_lists_every_target():
    phony = re.search(r"^\.PHONY: menu ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    menu = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert phony is not None
    assert re.findall(r"^make ([\w-]+)", menu, re.MULTILINE) == phony[1].replace("\\\n", "").split()


def test_the_build_requires_no_torch():
    assert not [name for name in PROJECT["build-system"]["requires"] if name.startswith("torch")]


def test_every_extra_that_another_names_exists():
    extras = PROJECT["project"]["optional-dependencies"]
    named = re.findall(r"wrpo\[([\w,]+)\]", str(list(extras.values())))
    assert set(",".join(named).split(",")) <= set(extras)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_op_documents_each_argument_the_result_and_the_errors(name):
    op = getattr(wrpo_kernels, name)
    words = inspect.getdoc(op) or ""
    for heading in ("Args:", "Returns:", "Raises:", "Source:"):
        assert heading in words, f"{name}: the docstring has no {heading}"
    missing = [argument for argument in inspect.signature(op).parameters if not re.search(rf"\b{argument}\b", words)]
    assert not missing, f"{name}: the docstring does not name {missing}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_op_takes_tensors_first_and_options_by_keyword(name):
    parameters = inspect.signature(getattr(wrpo_kernels, name)).parameters.values()
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position
    assert all("Tensor" in p.annotation for p in by_position)


@pytest.mark.parametrize("law", LAWS)
def test_a_law_gives_its_reason(law):
    assert len(LAWS[law]["description"]) > 20


# The offending text is put together here so that this file keeps the laws itself.
@pytest.mark.parametrize(
    ("law", "guilty", "innocent"),
    [
        ("no-attic", "wrpo/" + "utils.py", "wrpo/training/schedule.py"),
        ("no-attic", "csrc/cpu/" + "helpers.h", "csrc/cpu/token_logp.h"),
        ("no-fast-math", '"-O3", "' + "-ffast" + '-math"', '"-O3", "-fno-math-errno"'),
        ("todo-has-issue", "# TO" + "DO: later", "# TO" + "DO(#12): later"),
        ("no-torch-func", "from torch" + ".func import grad", "from torch.autograd import grad"),
        ("no-reruns", "time.sl" + "eep(1)", "time.perf_counter()"),
        ("kernels-stand-alone", "from wr" + "po.head import x", "from wrpo_kernels.checks import x"),
        ("kernels-stand-alone", "import trans" + "formers", "import torch"),
    ],
)
def test_a_law_catches_what_it_swears_off_and_nothing_else(law, guilty, innocent):
    hook = LAWS[law]
    pattern = hook["files"] if hook["language"] == "fail" else hook["entry"]
    assert re.search(pattern, guilty)
    assert not re.search(pattern, innocent)
