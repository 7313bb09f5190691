"""`linear_cross_entropy`: the values and gradients of torch's own cross entropy on whole logits, in float64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from oracle import Transform
from torch import Tensor
from torch.nn import functional as F

from wrpo_kernels import linear_cross_entropy
from wrpo_kernels.integrations import pytorch

N, D, V = 11, 7, 23
SMALL_BUDGET = 3 * (V + 4 * D) * 8


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels; NaN where no label counts."""
    labels = torch.randint(0, V, (N,))
    labels[::4] = -100
    hidden, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((N, D), (V, D), (V,)))
    hidden[labels == -100] = torch.nan
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def truth(
    hidden,
    weight,
    bias,
    labels,
    transform=None,
    *,
    class_weight=None,
    z_loss=0.0,
    reduction="mean",
    label_smoothing=0.0,
) -> Tensor:
    """Torch's cross entropy, and the z-loss as its formula says; the mean is over what counts, by class weight."""
    scores = (transform or Transform())(hidden.where((labels != -100)[:, None], 0.0) @ weight.T, bias)
    loss = F.cross_entropy(scores, labels, class_weight, reduction="none", label_smoothing=label_smoothing)
    counts = (labels != -100).double()
    loss = loss + z_loss * scores.logsumexp(1) ** 2 * counts
    if reduction == "none":
        return loss
    share = counts if class_weight is None else class_weight[labels.clamp(min=0)] * counts
    return loss.sum() if reduction == "sum" else loss.sum() / share.sum()


SCALED = {"logit_scale": 0.3, "temperature": 0.7}
CAPPED = {"softcap": 3.0, "temperature": 0.7}
CASES = [
    *itertools.product(("mean", "none"), (0.0, 0.1), (0.0, 0.02), (False, True), [SCALED]),
    *itertools.product(("sum",), (0.0, 1.0), (0.0, 0.02), (True,), [{}]),
    *itertools.product(("mean",), (0.0,), (0.0, 0.02), (False, True), [CAPPED]),
    *itertools.product(("mean", "none"), (0.1,), (0.0, 0.02), (False, True), [CAPPED]),
]


@pytest.mark.parametrize("budget", [None, SMALL_BUDGET], ids=["all rows fit", "chunks"])
@pytest.mark.parametrize(("reduction", "smoothing", "z_loss", "weighted", "transform"), CASES)
def test_values_and_gradients_are_those_of_torch(reduction, smoothing, z_loss, weighted, transform, budget):
    hidden, weight, bias, labels = head()
    class_weight = torch.rand(V, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
    got = linear_cross_entropy(
        hidden, weight, labels, bias=bias, class_weight=class_weight, budget_bytes=budget, **options, **transform
    )
    expected = truth(hidden, weight, bias, labels, Transform(**transform), class_weight=class_weight, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    c = torch.randn_like(got)
    grads = [torch.autograd.grad(y, [hidden, weight, bias], c) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


def test_labels_of_hugging_face_are_shifted_here():
    hidden, weight, bias, labels = head()
    hidden, labels = hidden.detach().nan_to_num().view(1, N, D), labels.view(1, N)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
        got = linear_cross_entropy(hidden, weight, labels, bias=bias, shift=True, **options)
        expected = truth(hidden[0, :-1], weight, bias, labels[0, 1:], **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_adapter_on_the_head_is_smoothed_too(weighted):
    hidden, weight, bias, labels = head()
    hidden = hidden.detach().nan_to_num()
    low, up = (torch.randn(size, 2, dtype=torch.float64, requires_grad=True) for size in (N, V))
    class_weight = torch.rand(V, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weight": class_weight}
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, adapter=(low, up), **options)
    both = torch.cat([hidden, low], 1), torch.cat([weight, up], 1)
    expected = truth(*both, bias, labels, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    grads = [torch.autograd.grad(y, [low, up, weight]) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}], ids=str)
def test_of_sixteen_bits_only_the_logits_are_rounded(options):
    hidden, weight, bias, labels = head(torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", **options)
    given = [x.detach().double() for x in (hidden, weight, bias)]
    exact = truth(*given, labels, reduction="none", **options)
    largest = (given[0].nan_to_num() @ given[1].T).abs().amax(1) + given[2].abs().max()
    assert got.dtype == torch.float32
    assert (
        (got - exact).abs() <= oracle.ulp(largest, torch.bfloat16)
    ).all()  # half of the label's, half of the others'


def test_logits_in_float32_are_those_of_the_weighted_mean_too():
    hidden, weight, bias, labels = head(torch.bfloat16)
    options = {"label_smoothing": 0.9, "class_weight": torch.linspace(0.1, 1.0, V).double(), "reduction": "none"}
    given = [x.detach().double() for x in (hidden, weight, bias)]
    exact = truth(*given, labels, Transform(softcap=3.0), **options)
    for logits_dtype, error in ((torch.float32, 1e-6), (None, 1e-2)):
        got = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=3.0, logits_dtype=logits_dtype, **options)
        assert (got - exact).abs().max() <= error * exact.abs().max()


@pytest.mark.parametrize(("weighted", "softcap"), [(False, None), (True, None), (True, 3.0)])
def test_autocast_leaves_the_products_of_all_tokens_alone(weighted, softcap):
    *given, labels = head(torch.float32)
    class_weight = torch.linspace(0.1, 1.0, V) if weighted else None
    options = {"bias": given[2], "class_weight": class_weight, "label_smoothing": 0.1, "z_loss": 0.01}
    options["softcap"] = softcap
    expected = linear_cross_entropy(*given[:2], labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(*given[:2], labels, **options)
    oracle.assert_same_bits("loss", got, expected)
    for grad, true in zip(*(torch.autograd.grad(x, given) for x in (got, expected)), strict=True):
        oracle.assert_same_bits("gradient", grad, true)


@pytest.mark.parametrize("budget", [None, 1024])
def test_weighted_smoothing_adds_its_gradients_in_float32_in_however_many_pieces(budget):
    hidden, weight = (1 + 0.1 * torch.randn(2048, 32)).bfloat16(), torch.randn(64, 32).bfloat16()
    labels, options = torch.randint(0, 64, (2048,)), {"softcap": 30.0, "label_smoothing": 0.5, "reduction": "sum"}
    options["class_weight"] = torch.rand(64)

    def gradient(dtype: torch.dtype, budget: int | None = None) -> Tensor:
        head = weight.to(dtype).requires_grad_()
        loss = linear_cross_entropy(hidden.to(dtype), head, labels, budget_bytes=budget, **options)
        return torch.autograd.grad(loss, head)[0].double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16, budget) - exact).norm() < 0.01 * exact.norm()


BENT = {"label_smoothing": 0.1, "softcap": 3.0, "class_weight": torch.ones(V)}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, BENT], ids=["", "smoothed", "bent"])
def test_a_batch_without_labels_is_nan_in_the_mean_as_in_torch_and_zero_in_the_sum(options):
    hidden, weight, _, labels = head()
    labels[:] = -100
    assert linear_cross_entropy(hidden, weight, labels, **options).isnan()
    assert linear_cross_entropy(hidden, weight, labels, reduction="sum", **options) == 0
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="none", **options)
    assert empty.shape == (0,)


def test_torchs_own_names_mean_the_same():
    hidden, weight, bias, labels = head()
    hidden = hidden.detach().nan_to_num()
    labels[labels == -100] = 5
    class_weight = torch.rand(V, dtype=torch.float64)
    given = {"linear_bias": bias, "weight": class_weight, "label_smoothing": 0.1, "ignore_index": 5}
    got = pytorch.linear_cross_entropy(hidden, weight, labels, **given)
    expected = F.cross_entropy(
        F.linear(hidden, weight, bias), labels, class_weight, ignore_index=5, label_smoothing=0.1
    )
    torch.testing.assert_close(got, expected)


def test_the_signature_is_torchs_where_torch_has_it():
    import inspect

    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    own, theirs = (inspect.signature(f).parameters for f in (pytorch.linear_cross_entropy, F.linear_cross_entropy))
    assert {(p.name, p.kind, p.default) for p in own.values()} == {(p.name, p.kind, p.default) for p in theirs.values()}
    assert [*own] == [*theirs]


def test_under_autocast_torchs_name_multiplies_in_its_type():
    hidden, weight, _, labels = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = pytorch.linear_cross_entropy(hidden, weight, labels)
    expected = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    oracle.assert_same_bits("loss", got, expected)


GOOD = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2).long()}
REFUSED = {
    "unknown reduction": ({"reduction": "max"}, ValueError, "reduction.*'max'"),
    "class weights of another size": (
        {"class_weight": torch.ones(4)},
        ValueError,
        r"class_weight.*\[V\].*\[5\].*\[4\]",
    ),
    "class weights that are trained": ({"class_weight": torch.ones(5, requires_grad=True)}, ValueError, "class_weight"),
    "too much smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing.*1.5"),
    "a filter with a capped z-loss": (
        {"z_loss": 0.1, "softcap": 30.0, "grad_filter": 1e-4},
        ValueError,
        "grad_filter.*z_loss.*softcap",
    ),
    "negative z-loss": ({"z_loss": -1.0}, ValueError, "z_loss.*-1"),
    "labels of another shape": ({"labels": torch.zeros(3).long()}, ValueError, "^labels"),
    "float labels": ({"labels": torch.zeros(2)}, ValueError, "^labels must be int64"),
    "a label V": ({"labels": torch.full((2,), 5)}, ValueError, r"^labels\[0\].*V=5.*got 5"),
    "a label V, smoothed": ({"labels": torch.full((2,), 5), "label_smoothing": 0.1}, ValueError, r"^labels\[0\]"),
    "several softcaps": ({"softcap": torch.ones(2)}, TypeError, "^softcap must be a number"),
    "several z-losses": ({"z_loss": torch.ones(2)}, TypeError, "^z_loss must be a number"),
    "several smoothings": ({"label_smoothing": torch.ones(2)}, TypeError, "^label_smoothing must be a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**GOOD, **changes})


def test_what_torchs_name_cannot_do_here_is_refused():
    hidden, weight, _, labels = head(torch.float32)
    with pytest.raises(NotImplementedError, match="class indices"):
        pytorch.linear_cross_entropy(hidden, weight, torch.rand(N, V))
    with pytest.raises(NotImplementedError, match=r"\[V, D\]"):
        pytorch.linear_cross_entropy(hidden, weight.view(V, 1, D), labels)
    with pytest.raises(NotImplementedError, match="options"):
        pytorch.linear_cross_entropy(hidden, weight, labels, options=object())
