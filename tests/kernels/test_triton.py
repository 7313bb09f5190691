"""What only the Triton kernels promise: when they run, what a wrong label gives, how a program walks over its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import interpreter
import oracle
import pytest
import torch
from cases import Case

from wrpo_kernels import linear_token_logp, token_logp
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.lm_head.head import CANDIDATES
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss import reference
from wrpo_kernels.token_logp import contract

ROOT = Path(__file__).resolve().parent.parent.parent
NOTHING = LogitTransform(None, 1.0, 0.0, 1.0)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU; without one the CPU, where the interpreter plays the kernels."""
    if reason := triton_backend.missing():
        pytest.skip(reason)
    if request.param == "cpu":
        interpreter.compute_like_a_gpu()
    return torch.device(request.param)


@pytest.fixture
def row_kernels(device):
    from wrpo_kernels.token_logp import triton_kernel

    return triton_kernel


# A program that names no backend, then the one it cannot have, then asks what there is; each in lines of its own.
PROGRAM = """
import sys, torch
before = set(sys.modules)
import wrpo_kernels
given = torch.zeros(2, 5), torch.zeros(2).long()
wrpo_kernels.token_logp(*given)
print([name for name in set(sys.modules) - before if name.split(".")[0] == "triton"])
try:
    wrpo_kernels.token_logp(*given, backend="triton")
except RuntimeError as error:
    print(" ".join(str(error).split()))
from wrpo_kernels.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """The program's lines where Triton is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_importing_the_kernels_and_running_others_imports_no_triton(shown):
    assert shown[0] == "[]"


def test_a_cpu_tensor_is_refused_with_the_way_to_the_interpreter(shown):
    assert "backend='triton' cannot do this call: runs on cuda tensors, got cpu" in shown[1]
    assert "TRITON_INTERPRET=1" in shown[1]


def test_the_report_lists_triton_with_its_reason(shown):
    assert any("not triton: " in line or "runs triton" in line for line in shown[2:])


def test_the_interpreter_runs_only_when_it_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    without_native = contract.CANDIDATES[1:]
    assert choose(None, without_native, torch.zeros(1, 2)).NAME == "reference"


@pytest.mark.parametrize("writes_delta", [False, True])
def test_a_label_out_of_range_makes_its_row_nan_and_no_other(writes_delta, row_kernels, device):
    """The launch below `forward` reads no label on the host, as on a GPU."""
    logits, target = cases.logits_of(Case("", (6,), 131, target="ends"), torch.float32, device)
    wrong = torch.tensor([131, -1, 2**40, -(2**62)], device=device)
    target[1:5] = wrong
    logp, lse = logits.new_empty(6), logits.new_empty(2, 6)
    row_kernels.rows_kernel(logits, target, -100, NOTHING, logp, lse, writes_delta)
    assert torch.equal(logp.isnan(), torch.tensor([False, True, True, True, True, False], device=device))
    assert torch.equal(lse.sum(0).isnan(), logp.isnan())
    if writes_delta:
        assert logits[1:5].isnan().all()
        assert logits[[0, 5]].isfinite().all()
    grad = torch.empty_like(logits)
    row_kernels.grad(logits.nan_to_num(), target, -100, NOTHING, logp, lse, torch.ones_like(logp), grad)
    assert grad[1:5].isnan().all()


def test_a_program_walks_over_several_rows(row_kernels, device, monkeypatch):
    logits, target = cases.logits_of(Case("", (7,), 131), torch.bfloat16, device)
    results = []
    for count in (7, 3, 1):
        monkeypatch.setattr(row_kernels, "programs", lambda *_, count=count: count)
        delta, logp, lse = logits.clone(), torch.empty(7, device=device), torch.empty(2, 7, device=device)
        row_kernels.delta_(delta, target, -100, NOTHING, logp, lse)
        results.append((delta, logp))
    for delta, logp in results[1:]:
        oracle.assert_same_bits("delta", delta, results[0][0])
        oracle.assert_same_bits("logp", logp, results[0][1])


@pytest.mark.parametrize("vocabulary", [4095, 4097, 16384, 16400, 40000])
def test_the_delta_in_place_is_the_gradient(vocabulary, row_kernels, device):
    """Around one tile of a row, and over several."""
    logits, target = cases.logits_of(Case("", (3,), vocabulary), torch.float32, device)
    (want,) = torch.autograd.grad(token_logp(x := logits.clone().requires_grad_(), target, backend="triton").sum(), x)
    logp, lse = torch.empty(3, device=device), torch.empty(2, 3, device=device)
    row_kernels.delta_(logits, target, -100, NOTHING, logp, lse)
    # One divides by the sum, one subtracts its logarithm.
    torch.testing.assert_close(logits, want, rtol=2e-6, atol=1e-12)


def test_what_surrounds_the_rows_is_not_written(row_kernels, device):
    whole = torch.full((9, 140), 7.0, device=device)
    target = torch.zeros(7, dtype=torch.int64, device=device)
    target[3] = -100
    row_kernels.delta_(
        whole[1:8, 4:135], target, -100, NOTHING, torch.empty(7, device=device), torch.empty(2, 7, device=device)
    )
    whole[1:8, 4:135] = 7.0
    assert (whole == 7.0).all()


@pytest.fixture
def sequence_kernels(device):
    from wrpo_kernels.preference_loss import triton_kernel

    return triton_kernel


LENGTHS = [3, 0, 700, 1, 256, 0]


def test_sequence_sums_and_rows_of_coefficients_are_those_of_the_reference(sequence_kernels, device):
    length = torch.tensor(LENGTHS, device=device)
    rows, values = -10 * torch.rand(sum(LENGTHS), device=device), torch.randn(len(LENGTHS), device=device)
    sums = sequence_kernels.sequence_sum(rows, length)
    # Both sum in float64: the difference is its rounding, far below that to float32.
    torch.testing.assert_close(sums, reference.sequence_sum(rows, length), rtol=1.2e-7, atol=0)
    assert torch.equal(sequence_kernels.over_rows(values, length, len(rows)), reference.over_rows(values, length, 960))


def test_rows_that_no_sequence_names_have_no_coefficient(sequence_kernels, device):
    length = torch.tensor([2, 1], device=device)
    rows = sequence_kernels.over_rows(torch.ones(2, device=device), length, 5)
    assert torch.equal(rows.isnan(), torch.tensor([False, False, False, True, True], device=device))


FUSED = {
    "one row": Case("", (1,), 61, width=24),
    "a second tile of rows, ranges of the vocabulary": Case("", (131,), 519, width=70),
    "peaked": cases.VALUES["peaked"],
    "huge": cases.VALUES["huge"],
    "all ignored": cases.VALUES["all ignored"],
    "padded rows": cases.LAYOUTS["padded rows"],
    "transposed": cases.LAYOUTS["transposed"],
    "empty": cases.SHAPES["empty"],
}


def check_fused(case: Case, dtype: torch.dtype, transform: oracle.Transform, device: torch.device) -> None:
    hidden, weight, target = cases.hidden_of(case, dtype, device)
    truth = oracle.linear_truth(hidden, weight, target, cases.cotangent(target), transform)
    plain = oracle.plain_linear_token_logp(hidden, weight, target, transform)
    options = {"backend": "triton_fused", **transform._asdict()}
    with torch.no_grad():
        got = linear_token_logp(hidden, weight, target, **options)
        again = linear_token_logp(hidden, weight, target, **options)
    oracle.assert_rule("logp", got, truth.logp, plain, truth.slack["logp"])
    oracle.assert_same_bits("logp", again, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
def test_a_product_that_writes_no_logits_is_as_good_as_plain_torch(case, dtype, device):
    check_fused(case, dtype, oracle.Transform(), device)


@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_a_product_that_writes_no_logits_transforms_them(name, device):
    bias = torch.randn(131, device=device).bfloat16()
    check_fused(Case("", (6,), 131), torch.bfloat16, cases.TRANSFORMS[name](bias), device)


def test_a_label_out_of_range_is_nan_in_the_product_too(device, monkeypatch):
    from wrpo_kernels.lm_head import triton_kernel

    monkeypatch.setattr(triton_kernel.row_kernels, "check_labels_where_free", lambda *arguments: None)
    hidden, weight, _ = cases.hidden_of(Case("", (6,), 131), torch.float32, device)
    target = torch.tensor([0, 131, -1, 2**40, -100, 130], device=device)
    logp = torch.empty(6, device=device)
    triton_kernel.logp_of_hidden(hidden, weight, target, -100, NOTHING, logp)
    assert torch.equal(logp.isnan(), torch.tensor([False, True, True, True, False, False], device=device))
    assert float(logp[4]) == 0


def test_the_product_waits_for_its_name_and_hands_gradients_to_the_chunked_passes(device):
    hidden, weight, target = cases.hidden_of(Case("", (5,), 61), torch.float32, device)
    x, y = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_token_logp(x, weight, target, backend="triton_fused").sum().backward()
    linear_token_logp(y, weight, target, backend="triton").sum().backward()
    oracle.assert_same_bits("grad", x.grad, y.grad)
    without_others = tuple(candidate for candidate in CANDIDATES if candidate.NAME == "triton_fused")
    with pytest.raises(RuntimeError, match="the chunked passes are faster"):
        choose(None, without_others, hidden)
