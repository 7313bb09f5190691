"""The CPU kernels of `preference_loss`: the truth rounded once, and sums over the rows of sequences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_rows import IGNORED, Guarded, _cpu, assert_within
from oracle import preference_truth, ulp
from torch import Tensor

LOSS_KINDS = ("sigmoid", "hinge", "ipo", "exo_pair", "discopop", "kto")


class Preference:
    """6 sequences in 3 groups, out of order; `options` as in the contract of the kernel."""

    def __init__(self, kind: str, logp: Tensor | None = None, **options) -> None:
        self.kind = kind
        self.logp = torch.tensor([-40.0, -35.5, -60.25, -12.0, -90.0, -33.0]) if logp is None else logp
        self.options = {
            "ref_logp": None,
            "seq_weight": torch.tensor([0.1, -1.0, 0.9, 1.0, -1.0, -0.5]),
            "group": torch.tensor([2, 2, 2, 0, 1, 0]),
            "length": None,
            "nll_weight": None,
            "group_weight": None,
            "group_beta": None,
            "group_gamma": None,
            "beta": 0.1,
            "gamma": 0.0,
            "label_smoothing": 0.001 if kind == "exo_pair" else 0.0,
            "length_normalize": False,
        } | options

    def run(self) -> dict[str, Tensor]:
        sizes = {"loss": 3, "reward": len(self.logp), "margin": 3, "coef": len(self.logp)}
        return self._into(sizes, _cpu.preference_loss, self.logp.data_ptr())

    def run_of_rows(self, rows: Tensor, divisor: float) -> dict[str, Tensor]:
        """From rows [N], `options["length"]` of them a sequence; `coef` is that of the rows."""
        sizes = {
            "total": 1,
            "loss": 3,
            "logp": len(self.logp),
            "reward": len(self.logp),
            "margin": 3,
            "coef": len(rows),
        }
        return self._into(sizes, _cpu.preference_loss_of_rows, rows.data_ptr(), len(rows), after=(divisor,))

    def run_of_logits_(self, logits: Tensor, target: Tensor, divisor: float) -> dict[str, Tensor]:
        """The same from float32 logits [N, V], whose gradient takes their place."""
        sequences, number = len(self.logp), len(logits)
        sizes = {"total": 1, "logp": sequences, "reward": sequences, "margin": 3, "coef": number}
        rows = (logits.data_ptr(), 0, *logits.shape, logits.stride(0), target.data_ptr(), IGNORED, 0.7, 5.0, 0.8, 2)
        return self._into(sizes, _cpu.preference_loss_of_logits_, *rows, after=(divisor,))

    def _into(self, sizes: dict[str, int], kernel: Callable, *front: int, after: tuple = ()) -> dict[str, Tensor]:
        o = self.options
        names = "ref_logp seq_weight group length nll_weight group_weight group_beta group_gamma".split()
        tensors = [o[name] for name in names]
        out = {name: torch.full((size + 2,), 77.0) for name, size in sizes.items()}
        kernel(
            *front,
            *(0 if x is None else x.data_ptr() for x in tensors),
            len(self.logp),
            3,
            o["beta"],
            o["gamma"],
            LOSS_KINDS.index(self.kind),
            0.05 if self.kind == "discopop" else o["label_smoothing"],
            o["length_normalize"],
            *after,
            *(x[1:].data_ptr() for x in out.values()),
        )
        assert all((x[[0, -1]] == 77.0).all() for x in out.values()), "the kernel wrote outside its results"
        return {name: x[1:-1] for name, x in out.items()}

    def check(self) -> None:
        """Sums run in double, so a result is the truth rounded once to float32: half an ulp, and a hair."""
        o, logp = self.options, self.logp.double().requires_grad_()
        told = {"nll_weight": 0.0 if o["nll_weight"] is None else o["nll_weight"]}
        told |= {x: o[x] if o[f"group_{x}"] is None else o[f"group_{x}"] for x in ("beta", "gamma")}
        given = {name: value for name, value in (o | told).items() if name not in ("group_beta", "group_gamma")}
        truth = preference_truth(logp, **given, num_groups=3, loss_type=self.kind)
        (coef,) = torch.autograd.grad(truth.loss.sum(), logp)
        for name, got in self.run().items():
            expected = {**truth._asdict(), "coef": coef}[name].detach()
            assert_within(name, got, expected, 0.5001 * ulp(expected, torch.float32))


PREFERENCES = {
    "plain": {},
    "reference": {"ref_logp": torch.tensor([-41.0, -35.0, -60.0, -15.0, -80.0, -33.5])},
    "margin": {"gamma": 0.7},
    "label smoothing": {"label_smoothing": 0.2},
    "mean over tokens": {"length": torch.tensor([10, 3, 7, 1, 9, 4]), "length_normalize": True, "beta": 2.5},
    "log-likelihood term": {"nll_weight": torch.tensor([0.1, 0.0, 0.2, 0.0, 0.3, 0.0])},
    "weighted groups": {"group_weight": torch.tensor([0.5, 2.0, 0.0])},
    "some weights 0": {"seq_weight": torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0, -0.5])},
    "an empty group": {"group": torch.tensor([2, 2, 2, 0, 2, 0])},
    "steep": {"beta": 3.0},
    "beta and gamma of each group": {
        "group_beta": torch.tensor([0.1, 0.5, 2.0]),
        "group_gamma": torch.tensor([0.5, 0.0, -2.0]),
    },
}


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_loss_matches_float64(name, kind):
    Preference(kind, **PREFERENCES[name]).check()


@pytest.mark.parametrize("margin", [1e4, 40.0, 1.0, 0.0, -40.0, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_sigmoid_loss_is_exact_far_from_zero(margin, label_smoothing):
    logp = torch.tensor([margin, 0.0, 0.0, 0.0, 0.0, 0.0])
    one = {"seq_weight": torch.ones(6), "group": torch.arange(6) % 3, "beta": 1.0}
    Preference("sigmoid", logp, label_smoothing=label_smoothing, **one).check()


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("worst", [-torch.inf, torch.nan])
def test_a_group_of_weight_zero_keeps_no_trace_of_its_margin(kind, worst):
    ref_logp, nll_weight = torch.zeros(6), torch.full((6,), 0.5)
    ref_logp[4] = worst  # the only sequence of group 1
    call = {"ref_logp": ref_logp, "group_weight": torch.tensor([1.0, 0.0, 1.0])}
    got = Preference(kind, **call).run()
    assert got["loss"][1] == got["coef"][4] == 0.0
    assert all(got[name].isfinite().all() for name in ("loss", "coef"))
    got = Preference(kind, **call, nll_weight=nll_weight).run()
    assert got["loss"][1] == 45.0  # 0.5 * 90: its log-likelihood term stays
    assert got["coef"][4] == -0.5


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_a_sequence_of_weight_zero_cannot_spoil_its_group(kind):
    spoilt = Preference(kind).options["seq_weight"].clone()
    spoilt[0] = 0.0
    ref_logp = torch.zeros(6)
    clean = Preference(kind, seq_weight=spoilt, ref_logp=ref_logp).run()
    ref_logp = ref_logp.index_fill(0, torch.tensor([0]), -torch.inf)
    got = Preference(kind, seq_weight=spoilt, ref_logp=ref_logp).run()
    assert all(torch.equal(got[name], clean[name]) for name in ("loss", "margin", "coef"))


def test_an_empty_sequence_has_no_reward_and_no_coefficient_under_length_normalisation():
    logp, length = torch.tensor([0.0, -35.5, -60.25, -12.0, -90.0, -33.0]), torch.tensor([0, 3, 7, 1, 9, 4])
    got = Preference("sigmoid", logp, length=length, length_normalize=True, nll_weight=torch.ones(6)).run()
    assert got["reward"][0] == got["coef"][0] == 0.0
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_group_that_does_not_exist_is_refused(wrong):
    group = torch.tensor([2, 2, 2, 0, wrong, 0])
    with pytest.raises(ValueError, match=rf"group\[4\].*G = 3.*got {wrong}"):
        Preference("sigmoid", group=group).run()


LENGTHS = torch.tensor([3, 0, 1, 70000, 2, 5])


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_rows_give_the_losses_of_their_sums_and_take_the_coefficients_of_their_sequences(kind):
    rows = -0.001 * torch.rand(int(LENGTHS.sum()))
    got = Preference(kind, length=LENGTHS).run_of_rows(rows, 3.0)
    truth = torch.stack([part.double().sum() for part in rows.split(LENGTHS.tolist())])
    assert_within("sum", got["logp"], truth, 0.5001 * ulp(truth, torch.float32))  # summed in double, rounded once
    expected = Preference(kind, got["logp"], length=LENGTHS).run()
    assert all(torch.equal(got[name], expected[name]) for name in ("loss", "reward", "margin"))
    assert torch.equal(got["coef"], (expected["coef"] / 3).repeat_interleave(LENGTHS))
    assert torch.equal(got["total"][0], expected["loss"].double().sum().float() / 3)


def test_logits_give_what_the_passes_over_rows_and_sequences_give_one_after_the_other():
    length = torch.tensor([3, 0, 1, 7, 2, 5])
    guarded, target = Guarded(torch.randn(18, 131)), torch.randint(0, 131, (18,))
    gradient, logp, lse = guarded.rows.clone(), torch.empty(18), torch.empty(2, 18)
    front = (gradient.data_ptr(), 0, 18, 131, 131, target.data_ptr(), IGNORED, 0, 0.7, 5.0, 0.8)
    found = (logp.data_ptr(), lse.data_ptr())
    _cpu.token_logp(*front, *found, 2)
    expected = Preference("sigmoid", length=length).run_of_rows(logp, 3.0)
    _cpu.token_logp_grad(*front, *found, expected["coef"].data_ptr(), gradient.data_ptr(), 131, 2)
    got = Preference("sigmoid", length=length).run_of_logits_(guarded.rows, target, 3.0)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert torch.equal(guarded.rows, gradient)
    guarded.assert_untouched_around()
    with pytest.raises(ValueError, match="N: expected at least 1, got 0"):
        Preference("sigmoid", length=length).run_of_logits_(gradient[:0], target, 3.0)
    with pytest.raises(ValueError, match=r"target\[0\]: expected a value in \[0, V = 131\)"):
        Preference("sigmoid", length=length).run_of_logits_(gradient, target + 131, 3.0)


@pytest.mark.parametrize(
    ("length", "message"), [([3, -1, 3, 0, 0, 0], "length: .* got -1"), ([3, 0, 3, 0, 0, 0], "length: .* got 6")]
)
def test_lengths_that_do_not_add_up_to_the_rows_are_refused(length, message):
    with pytest.raises(ValueError, match=message):
        Preference("sigmoid", length=torch.tensor(length)).run_of_rows(torch.zeros(5), 1.0)


def test_rows_without_a_length_are_refused():
    with pytest.raises(ValueError, match="length: expected a pointer"):
        Preference("sigmoid").run_of_rows(torch.zeros(5), 1.0)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[:, 3:8], lambda x: x[::2], lambda x: x[:0]])
def test_labels_are_counted_by_sequence_whatever_their_strides(view):
    labels = view(torch.randint(-101, -98, (9, 11)))
    counts = torch.full((labels.shape[0] + 2,), 77)
    _cpu.count_labels(labels.data_ptr(), *labels.shape, *labels.stride(), IGNORED, counts[1:].data_ptr())
    assert torch.equal(counts[1:-1], (labels != IGNORED).sum(1))
    assert counts[0] == counts[-1] == 77


def test_sequences_without_a_position_have_no_label_to_count():
    counts = torch.full((2,), 77)
    _cpu.count_labels(0, 2, 0, 0, 1, IGNORED, counts.data_ptr())
    assert counts.tolist() == [0, 0]
    with pytest.raises(ValueError, match="labels: expected a pointer"):
        _cpu.count_labels(0, 2, 1, 1, 1, IGNORED, counts.data_ptr())
