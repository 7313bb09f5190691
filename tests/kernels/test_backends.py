"""Which implementation runs: the one that was named, or an error with its reason; never another in silence."""

from __future__ import annotations

import importlib.util
import inspect
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import doors
import pytest
import torch

import wrpo_kernels
from wrpo_kernels import __version__

ROW_KERNELS = ("token_logp", "token_logp_delta_", "token_logp_grad", "token_statistics", "token_statistics_grad_")
ROW_KERNELS += ("preference_loss", "preference_loss_of_rows", "preference_loss_of_logits_")
GENERAL = {
    "seq_weight": torch.tensor([0.3, 0.7, -1.0, 1.0, -0.5, -0.5]),
    "group": torch.tensor([0, 0, 0, 1, 1, 1]),
    "beta": 0.1,
}


def calls(dtype: torch.dtype = torch.float32) -> dict[str, Callable[..., torch.Tensor]]:
    """Every public function as one of its options alone; all return something with a gradient."""
    hidden, weight = torch.randn(6, 4, 8, dtype=dtype, requires_grad=True), torch.randn(11, 8, dtype=dtype)
    labels = torch.randint(0, 11, (6, 4))
    logits = torch.randn(6, 4, 11, dtype=dtype, requires_grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    logp = torch.randn(6, dtype=wide, requires_grad=True)
    pairs, lengths = logp.chunk(2), torch.full((6,), 4).chunk(2)
    general = GENERAL | {"seq_weight": GENERAL["seq_weight"].to(wide)}
    kto = {"is_desirable": torch.tensor([True, False] * 3), "kl": 0.5}
    needed: dict[str, tuple[tuple, dict]] = {
        "token_logp": ((logits, labels), {}),
        "linear_token_logp": ((hidden, weight, labels), {}),
        "linear_cross_entropy": ((hidden, weight, labels), {}),
        "linear_token_statistics": ((hidden, weight, labels), {}),
        "linear_nll_loss": ((hidden, weight, labels), {}),
        "kto_loss": ((logp, torch.zeros(6, dtype=wide)), kto),
        "linear_kto_loss": ((hidden, weight, labels, torch.zeros(6, dtype=wide)), kto),
        "preference_loss": ((logp,), general),
        "linear_preference_loss": ((hidden, weight, labels), general),
        "wrpo_loss": ((logp,), {"alpha": 0.3}),
        "linear_wrpo_loss": ((hidden, weight, labels), {"alpha": 0.3}),
        "dpo_loss": (pairs, {}),
        "ipo_loss": (pairs, {}),
        "simpo_loss": ((*pairs, *lengths), {}),
        **{f"linear_{name}_loss": ((hidden, weight, labels), {}) for name in ("dpo", "ipo", "simpo")},
    }

    def call(door: str, **options: Any) -> torch.Tensor:
        arguments, own = needed[door]
        output = getattr(wrpo_kernels, door)(*arguments, **own, **options)
        return getattr(output, "entropy", getattr(output, "loss", output))

    return {door: partial(call, door) for door in needed}


DOORS = tuple(calls())


def test_every_public_function_that_takes_a_backend_is_asked_here_and_in_the_tests_of_graphs():
    takes_one = {name for name in wrpo_kernels.__all__ if "backend" in parameters(getattr(wrpo_kernels, name))}
    assert takes_one == set(DOORS) == {door.split(",")[0] for door in doors.DOORS}


def parameters(value: object) -> Collection[str]:
    return inspect.signature(value).parameters if callable(value) else ()


@pytest.fixture
def native_calls(monkeypatch) -> Counter:
    """How often each compiled row kernel has run."""
    native = pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built here")
    counter: Counter = Counter()

    def counting(name: str, kernel: Callable) -> Callable:
        def call(*arguments):
            counter[name] += 1
            return kernel(*arguments)

        return call

    for name in ROW_KERNELS:
        monkeypatch.setattr(native, name, counting(name, getattr(native, name)))
    return counter


@pytest.mark.parametrize("door", DOORS)
def test_the_backend_that_was_named_is_the_one_that_runs_forward_and_backward(door, native_calls):
    calls()[door](backend="reference").sum().backward()
    assert not native_calls
    calls()[door](backend="native").sum().backward()
    needed = {
        "token_logp": {"token_logp", "token_logp_grad"},
        "linear_token_logp": {"token_logp_delta_"},
        "linear_token_statistics": {"token_logp", "token_statistics", "token_statistics_grad_"},
    }
    of_loss = {"preference_loss_of_logits_" if door.startswith("linear_") else "preference_loss"}
    assert set(native_calls) >= needed.get(door, of_loss)


@pytest.mark.parametrize("door", DOORS)
def test_without_a_name_the_native_kernels_run_where_they_can(door, native_calls):
    calls()[door]().sum().backward()
    assert native_calls


@pytest.mark.parametrize("door", DOORS)
def test_without_a_name_the_reference_takes_what_the_others_refuse(door):
    """float64, which no kernel computes."""
    value = calls(torch.float64)[door]()
    assert value.dtype == torch.float64
    value.sum().backward()


@pytest.mark.parametrize("door", DOORS)
def test_a_named_backend_that_cannot_raises_with_its_reason(door):
    pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built here")
    with pytest.raises(RuntimeError, match=r"^backend='native' cannot do this call: takes float32.*got torch\.float64"):
        calls(torch.float64)[door](backend="native")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["fast", "", "Native", "triton "])
def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(door, name):
    with pytest.raises(ValueError, match=rf"^backend must be .*'native'.*'reference'.*got '{name}'"):
        calls()[door](backend=name)


def test_no_gradient_work_hides_in_the_forward(native_calls):
    """Only a head whose gradient is wanted makes `delta`; the forward alone makes log-probs."""
    with torch.no_grad():
        calls()["linear_token_logp"](backend="native")
        calls()["linear_wrpo_loss"](backend="native")
    assert not native_calls.keys() & {"token_logp_delta_", "preference_loss_of_logits_"}
    assert native_calls["token_logp"] >= 2


@pytest.fixture
def report(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`python -m wrpo_kernels` with arguments, in this process: status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wrpo_kernels", *arguments])
        status = 0
        try:
            runpy.run_module("wrpo_kernels", run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return (status, *capsys.readouterr())

    return run


def test_the_report_says_what_runs_here_and_why_the_others_do_not(report):
    status, shown, errors = report()
    assert (status, errors) == (0, "")
    lines = shown.splitlines()
    assert any(line.split() == ["wrpo", __version__] for line in lines)
    for package in ("torch", "python", "triton", "transformers"):
        assert any(line.startswith(package) for line in lines), package
    native = importlib.util.find_spec("wrpo_kernels._cpu") is not None
    for op in ("token_logp", "preference_loss"):
        (line,) = (line for line in lines if line.startswith(op) and "cpu" in line)
        assert line.split()[-1] == ("native" if native else "reference")
    if native:
        assert "simd" in shown
    else:
        assert "not native: wrpo_kernels._cpu was not built" in shown


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_the_report_says_what_it_shows(flag, report):
    status, shown, errors = report(flag)
    assert (status, errors) == (0, "")
    assert shown.startswith("python -m wrpo_kernels: what would run here")
    assert __version__ not in shown


def test_an_argument_that_the_report_does_not_know_is_one_line(report):
    line = "python -m wrpo_kernels takes no arguments but --help, got 'nonsense x'\n"
    assert report("nonsense", "x") == (2, "", line)
