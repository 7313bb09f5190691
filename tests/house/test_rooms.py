"""Which room may import which: downwards only, so that whoever reads a room knows what it cannot depend on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wrpo_kernels

ROOT = Path(__file__).resolve().parent.parent.parent

# Lowest first: a room imports those before it. A file at the root of a package is a room of its own.
ROOMS = {
    "wrpo_kernels": "version checks remembered layout logit_transform dispatch token_logp lm_head linear_token_logp "
    "linear_token_statistics preference_loss linear_preference_loss likelihood weighted_reward pairwise kto "
    "cross_entropy integrations environment __init__ __main__",
    "wrpo": "user_error spelling picture_style settings pretrained rows data head layouts reference training sampling "
    "scoring building evaluation __init__ demo cli __main__",
    "benchmarks": "__init__ suite fusion build compile_seconds gpu ledger first_gpu grad_filter growth "
    "logits_dtype losses_against_trl run step_profile test_ops whole_steps",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as `package.module...name`."""
    package = module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """Of `wrpo.data.loading`, `data`; of a name that the package itself gives, `__init__`."""
    package, *rest = module.split(".")
    name = rest[0] if rest else "__init__"
    return name if (ROOT / package / name).is_dir() or (ROOT / package / f"{name}.py").is_file() else "__init__"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_place(package):
    there = {path.stem for path in (ROOT / package).glob("*.py")}
    there |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert there == set(ROOMS[package].split())


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downwards_only(package):
    order = ROOMS[package].split()
    upwards = [
        f"{module_of(path)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] == package and order.index(room(name)) > order.index(room(module_of(path)))
    ]
    assert not upwards


def test_the_trainer_uses_public_names_of_the_kernels_only():
    private = [
        f"{module_of(path)} imports {name}"
        for path in sorted((ROOT / "wrpo").rglob("*.py"))
        for name in imported(path)
        if name.startswith("wrpo_kernels.") and name.split(".")[1] not in (*wrpo_kernels.__all__, "environment")
    ]
    assert not private
