"""The CUDA backend beyond what every backend promises: what it cannot check, how it keeps rows, why it refuses."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import DTYPES, Case
from conftest import HERE, PLAYED
from torch._subclasses.fake_tensor import FakeTensorMode

from wrpo_kernels import linear_preference_loss, linear_token_statistics, preference_loss, token_logp
from wrpo_kernels.dispatch import backends, cuda_launch
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss import cuda as losses_on_cuda
from wrpo_kernels.token_logp import cuda as rows_on_cuda
from wrpo_kernels.token_logp import reference

PLAIN = LogitTransform(None, 1.0, 0.0, 1.0)
PLACES = tuple(place for place in (*HERE, PLAYED) if place[0] == "cuda")


def test_a_wrong_target_makes_nan_of_its_own_row_and_of_no_other(place, device):
    """Reading the targets would wait for the device, and a clamped label would be a silent wrong loss."""
    logits = torch.randn(5, 33, device=device).requires_grad_()
    target = torch.tensor([0, 33, 5, -1, 2**40], device=device)
    logp = token_logp(logits, target, backend="cuda")
    logp.sum().backward()
    good = torch.tensor([True, False, True, False, False], device=device)
    for values in (logp.detach()[:, None], logits.grad):
        assert values[good].isfinite().all()
        assert values[~good].isnan().all()


def test_anomaly_detection_has_a_wrong_target_read_and_named(place, device):
    target = torch.tensor([0, 9], device=device)
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(ValueError, match=r"target\[1\].*9"),
    ):
        token_logp(torch.zeros(2, 5, device=device), target, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded rows"])
@pytest.mark.parametrize("vocabulary", [1, 3, 4095, 20011, 128256])
def test_delta_written_in_place_is_the_gradient_of_log_prob_one(vocabulary, layout, dtype, place, device):
    """Short rows stay in shared memory, of long ones a part, and edges of misaligned ones in neither: the same bits."""
    logits, target = cases.logits_of(Case("", (3,), vocabulary, layout=layout, target="ends"), dtype, device)
    target[1] = -100
    logp, lse, again = (torch.empty(*size, 3, device=device) for size in ((), (2,), ()))
    grad = torch.empty(logits.shape, dtype=dtype, device=device)
    rows_on_cuda.forward(logits, target, -100, PLAIN, logp, lse)
    rows_on_cuda.grad(logits, target, -100, PLAIN, logp, lse, torch.ones(3, device=device), grad)
    expected = logits.clone()
    reference.delta_(expected, target, -100, PLAIN, torch.empty_like(logp), torch.empty_like(lse))
    rows_on_cuda.delta_(logits, target, -100, PLAIN, again, lse)
    oracle.assert_same_bits("logp", again, logp)
    # Either rounds the exponent of each p by half an ulp, and exponents are 30 at most.
    ulps = 2 * oracle.ulp(expected, dtype) + (16 + 30) * torch.finfo(torch.float32).eps * expected.double().abs()
    for name, got in (("delta", logits), ("grad", grad)):
        assert ((got.double() - expected.double()).abs() <= ulps).all(), name


@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0])
@pytest.mark.parametrize("size", [1e7, 1e30, 1.5e38])
def test_scores_of_any_size_and_sign_of_scale_give_finite_gradients(size, scale, place, device):
    """Of a run that diverges: differences of scores are taken before anything can overflow."""
    logits = (size * (1 + torch.rand(4, 5003, device=device)) / 2).requires_grad_()
    target = torch.tensor([0, 17, 5002, 4000], device=device)
    with torch.no_grad():
        logits[0, 0] = logits[0].max() if scale > 0 else logits[0].min()
    logp = token_logp(logits, target, logit_scale=scale, backend="cuda")
    logp.sum().backward()
    z = (logits.detach().double() * scale).log_softmax(-1)
    expected = -z.exp()
    expected[torch.arange(4), target] += 1
    true = z[torch.arange(4), target]
    torch.testing.assert_close(logp.detach().double(), true, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), expected * scale, rtol=1e-5, atol=1e-6)


def test_sums_and_spreads_stay_within_their_rows_whatever_the_lengths_say(place, device):
    rows = torch.rand(7, device=device)
    length = torch.tensor([2, 0, -5, 3, 2**62, 1], device=device)
    sums = losses_on_cuda.sequence_sum(rows, length)
    expected = torch.stack([rows[a:b].double().sum() for a, b in ((0, 2), (2, 2), (2, 2), (2, 5), (5, 7), (7, 7))])
    assert torch.equal(sums, expected.float())
    values = torch.arange(6.0, device=device)
    assert losses_on_cuda.over_rows(values, length, 7).tolist() == [0, 0, 3, 3, 3, 4, 4]


def test_many_groups_and_sequences_span_blocks_and_tiles(place, device):
    """Bits of the CPU kernel's sums, or of the float64 formulas where that is not built."""
    size, groups = 1000, 300
    group = (torch.randperm(size) % groups).to(device)
    weight, logp, ref = torch.randn(size, device=device), -100 * torch.rand(size), -100 * torch.rand(size)
    options = {"seq_weight": weight, "group": group, "num_groups": groups, "beta": 0.1, "reduction": "none"}
    out = preference_loss(logp.to(device), ref.to(device), **options, backend="cuda")
    truth = oracle.preference_truth(logp, ref, **{k: v for k, v in options.items() if k != "reduction"})
    for field in ("loss", "reward", "margin"):
        true = getattr(truth, field).to(device)
        oracle.assert_rule(field, getattr(out, field), true, true, oracle.ulp(true, torch.float32))


def test_the_one_pass_form_uses_the_kernels_for_rows_sums_and_losses(place, device):
    """Two budgets: all rows at once, and groups in pieces of one row."""
    hidden, weight = torch.randn(6, 9, 16, device=device), torch.randn(301, 16, device=device) / 4
    labels = torch.randint(0, 301, (6, 9), device=device)
    labels[:, :2] = -100
    pairs = {"seq_weight": torch.tensor([1.0, 1, 1, -1, -1, -1], device=device), "beta": 0.1, "num_groups": 3}
    pairs["group"] = torch.arange(6, device=device) % 3
    for budget in (None, 1):
        results = []
        for backend in ("cuda", "reference"):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_preference_loss(h, w, labels, budget_bytes=budget, backend=backend, **pairs)
            out.loss.backward()
            results.append((out.loss.detach(), out.logp, out.margin, h.grad, w.grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)  # float32 sums of 301 and 54 terms


@pytest.mark.parametrize("budget", [None, 1], ids=["all rows fit", "one row at a time"])
def test_token_statistics_through_the_head_are_made_by_their_kernels(budget, place, device):
    hidden, weight = torch.randn(3, 5, 16, device=device), torch.randn(301, 16, device=device) / 4
    labels, ids = torch.randint(0, 301, (3, 5), device=device), torch.tensor([7, 300, 7], device=device)
    labels[:, 1] = -100
    adapter = (torch.randn(3, 5, 2, device=device), torch.randn(301, 2, device=device) / 4)
    results = []
    for backend in ("cuda", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, torch.linspace(-1, 1, 301, device=device))]
        options = {"bias": leaves[2], "adapter": adapter, "ids": ids, "softcap": 9.0, "backend": backend}
        found = linear_token_statistics(*leaves[:2], labels, budget_bytes=budget, **options)
        loss = sum(value.sum() for name, value in found._asdict().items() if name != "top1")
        results.append((*found, *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_backend_says_why_it_does_not_run_here():
    with pytest.raises(RuntimeError, match="backend='cuda' cannot do this call: runs on cuda tensors, got cpu"):
        token_logp(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot do this call: takes float32.* got torch\.float64"):
        token_logp(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), backend="cuda")


def test_tensors_that_only_pretend_to_be_on_a_device_pass_the_doors():
    """What a compiler traces: shapes, types and devices without a device, whichever backend is named. The derivative
    is called by its own name, for the autograd engine of a CPU-only torch crashes on a device that it lacks."""
    with FakeTensorMode(), torch.no_grad():
        logits = torch.empty(4, 33, dtype=torch.bfloat16, device="cuda")
        target = torch.empty(4, dtype=torch.int64, device="cuda")
        logp = token_logp(logits, target, backend="cuda")
        options = (None, 1.0, 0.0, 1.0, -100, "cuda")
        lse = torch.empty(2, 4, device="cuda")
        grad = torch.ops.wrpo.token_logp_backward(logp, logits, target, logp, lse, *options)
        pairs = {"seq_weight": torch.empty(4, device="cuda"), "group": torch.empty(4, dtype=torch.int64, device="cuda")}
        out = preference_loss(logp, **pairs, num_groups=2, beta=0.1, backend="cuda")
    assert (logp.device.type, logp.dtype, logp.shape) == ("cuda", torch.float32, (4,))
    assert (grad.device.type, grad.dtype, grad.shape) == ("cuda", torch.bfloat16, (4, 33))
    assert (out.margin.device.type, out.margin.shape) == ("cuda", (2,))


class Built:
    """A build for sm_80, sm_90 and sm_120, on a device of our choice."""

    def __init__(self, capability: int = 90, error: str | None = None, count: int = 1):
        self.error, self.count, self.device = error, count, capability

    def device_count(self) -> int:
        if self.error:
            raise RuntimeError(self.error)
        return self.count

    def archs(self) -> list[int]:
        return [80, 90, 120]

    def capability(self, device: int) -> int:
        return self.device


def reason_of(module, monkeypatch, missing: str = "") -> str | None:
    monkeypatch.setattr(cuda_launch, "load_extension", lambda name: (module, missing))
    return cuda_launch.unusable.__wrapped__() or cuda_launch.no_code_for.__wrapped__(0)


@pytest.mark.parametrize(
    ("capability", "runs"), [(75, False), (80, True), (86, True), (90, True), (100, False), (121, True), (130, True)]
)
def test_machine_code_runs_on_its_own_generation_and_ptx_on_later_ones(capability, runs, monkeypatch):
    reason = reason_of(Built(capability), monkeypatch)
    assert (reason is None) == runs
    assert runs or all(word in reason for word in ("sm_80, sm_90, sm_120", "WRPO_CUDA_ARCHS", f"sm_{capability}"))


def test_a_missing_driver_device_or_build_is_the_reason(monkeypatch):
    too_old = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    assert reason_of(Built(error=too_old), monkeypatch) == too_old
    assert "no device" in reason_of(Built(count=0), monkeypatch)
    assert reason_of(None, monkeypatch, "wrpo_kernels._cuda was not built") == "wrpo_kernels._cuda was not built"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_built_module_loads_without_a_driver_and_says_what_is_missing():
    module, reason = backends.load_extension("_cuda")
    if module is None:
        pytest.skip(reason)
    assert module.archs()
    assert module.runtime_version() >= 12000
    with pytest.raises(RuntimeError, match=r"driver|device"):
        module.token_logp(8, 0, 1, 1, 1, 8, -100, 0, 1.0, 0.0, 1.0, 8, 8, 0, 0)


def test_bindings_return_at_once_for_no_rows_and_name_a_wrong_argument(played_module):
    played_module.token_logp(0, 0, 0, 5, 5, 0, -100, 0, 1.0, 0.0, 1.0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"V: expected 1 to 2\^31 - 1, got 0"):
        played_module.token_logp(8, 0, 1, 0, 5, 8, -100, 0, 1.0, 0.0, 1.0, 8, 8, 0, 0)
    with pytest.raises(ValueError, match="logp: expected a pointer, got 0"):
        played_module.token_logp(8, 0, 1, 5, 5, 8, -100, 0, 1.0, 0.0, 1.0, 0, 8, 0, 0)
    with pytest.raises(ValueError, match=r"dtype: expected 0.*got 3"):
        played_module.token_logp(8, 3, 1, 5, 5, 8, -100, 0, 1.0, 0.0, 1.0, 8, 8, 0, 0)
