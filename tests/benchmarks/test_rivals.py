"""The benchmarks' rivals compute what the fused loss computes: same loss, same gradients, or they say why not.

The truth is float64. A rival's gradient may differ from it by what the roundings of a float32 head cost (`oracle`), and
by the error of its coefficient: dL/dl_s moves with the margin, by at most beta times the errors of the log-probs.
"""

from __future__ import annotations

import importlib.util
import math

import oracle
import pytest
import torch

from benchmarks.suite import training_contestants as training
from benchmarks.suite.accuracy import Truth
from benchmarks.suite.problem import IGNORED, Problem, Setting
from benchmarks.suite.rivals import COMPILED, RIVALS
from benchmarks.suite.training_models import work_of
from benchmarks.whole_steps import SAME_LOSS, median_interval

NAMED = {rival.name: rival for rival in RIVALS}
TRIPLES = Setting(vocabulary=199, width=24, examples=2, sources=1, response=7, prompt=4, beta=0.1)
SETTINGS = {
    "triples": TRIPLES,
    "four sources": TRIPLES._replace(sources=4, examples=1),
    "pairs": TRIPLES._replace(sources=0),
    "pairs without a prompt": TRIPLES._replace(sources=0, prompt=0),
    "softcap and scale": TRIPLES._replace(softcap=3.0, logit_scale=0.7),
    "frozen head": TRIPLES._replace(head="frozen"),
    "pairs, frozen head": TRIPLES._replace(head="frozen", sources=0),
}


def loss_or_skip(name: str, setting: Setting):
    """The rival's loss of the problem, and the problem; skips the test with the rival's own reason."""
    problem = Problem(setting)
    reason = NAMED[name].why_not(problem)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return problem, NAMED[name].loss(problem)


def truth_of(problem: Problem) -> tuple[torch.Tensor, oracle.Truth, float]:
    """Loss in float64, gradients and their slack, and the slack of the loss."""
    transform = oracle.Transform(logit_scale=problem.logit_scale, softcap=problem.softcap)
    operands = (problem.hidden, problem.weight, problem.labels)
    ones = torch.ones(problem.labels.shape, dtype=torch.float64)
    rows = oracle.linear_truth(*operands, ones, transform, IGNORED)
    logp = rows.logp.sum(1).requires_grad_()
    layout = {"seq_weight": problem.seq_weight, "group": problem.group, "num_groups": problem.num_groups}
    loss = oracle.preference_truth(logp, problem.ref_logp, beta=problem.beta, **layout).loss.mean()
    (coefficient,) = torch.autograd.grad(loss, logp)
    truth = oracle.linear_truth(*operands, coefficient[:, None].expand(problem.labels.shape), transform, IGNORED)
    # A sum of T log-probs is rounded T times on its way, each time by half an ulp of at most the sum.
    logp_slack = rows.slack["logp"].sum(1) + problem.labels.shape[1] * oracle.ulp(logp.detach(), torch.float32)
    margin_slack = problem.beta * (problem.seq_weight.double().abs() * logp_slack).view(-1, problem.num_groups).sum(0)
    # log sigmoid and its derivative, sigmoid(-m), change by less than the margin; near m = 0 the latter is 1/2, so that
    # a change of it is at most twice as large in relation to it. 4 ulp: of the arithmetic on a few numbers.
    relative = 4 * float(margin_slack.max()) + 4 * torch.finfo(torch.float32).eps
    for name, grad in truth.grads.items():
        truth.slack[name] = truth.slack[name] + relative * grad.abs()
    loss = loss.detach()
    return loss, truth, float(margin_slack.mean()) + relative * float(loss)


def assert_equal_to_the_truth(problem: Problem, loss: torch.Tensor) -> None:
    expected, truth, slack = truth_of(problem)
    assert loss.shape == ()
    assert abs(float(loss.detach()) - float(expected)) <= slack
    loss.backward()
    leaves = {"hidden": problem.hidden, "weight": problem.weight}
    for name, leaf in leaves.items():
        if not leaf.requires_grad:
            assert leaf.grad is None, f"{name} is frozen and has a gradient"
            continue
        assert truth.grads[name].abs().max() > 100 * truth.slack[name].max(), "the gradient is all noise"
        oracle.assert_rule(name, leaf.grad, truth.grads[name], truth.grads[name], truth.slack[name])


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", NAMED)
def test_loss_and_gradients_are_those_of_float64(name, kind):
    problem, loss = loss_or_skip(name, SETTINGS[kind])
    with torch.compiler.set_stance("force_eager"):  # compiled as well below, once
        assert_equal_to_the_truth(problem, loss())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiled_code_computes_the_same(name):
    problem, loss = loss_or_skip(name, SETTINGS["pairs"])
    assert_equal_to_the_truth(problem, loss())


@pytest.mark.parametrize("name", NAMED)
def test_a_second_step_gives_the_same_gradients(name):
    problem, loss = loss_or_skip(name, SETTINGS["pairs"])
    with torch.compiler.set_stance("force_eager"):
        loss().backward()
        first = problem.weight.grad.clone()
        problem.forget_gradients()
        loss().backward()
    torch.testing.assert_close(problem.weight.grad, first)


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith("Liger DPO")])
def test_a_long_response_is_added_up_as_well_as_by_plain_torch(name):
    """What a rival's figure shows is its own error: Liger adds up itself, the others leave it to the benchmarks."""
    setting = Setting(vocabulary=97, width=16, response=16384, head="no_grad")
    problem, loss = loss_or_skip(name, setting)
    exact = Truth(problem)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        error = exact.errors(problem, loss()).loss * exact.loss
    # In pairs a sum is rounded log2 T times, by half an ulp of the whole at most, and d loss / d margin is near 1/2.
    # Added one after the other the log-probs of this problem err by five times as much.
    ulp = float(oracle.ulp(problem.ref_logp.double().max(), torch.float32))
    assert error <= 0.5 * problem.beta * 2 * math.log2(setting.response) * ulp / 2


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("head", ["lora", "no_grad"])
def test_every_head_is_trained_as_far_as_it_asks(name, head):
    problem, loss = loss_or_skip(name, SETTINGS["pairs"]._replace(head=head))
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(head != "no_grad"):
        value = loss()
        if head == "lora":
            value.backward()
    assert value.isfinite() and value.requires_grad == (head == "lora")
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in problem.leaves().values())


def test_what_cannot_run_here_says_why():
    pairs, triples, capped = (Problem(SETTINGS[kind]) for kind in ("pairs", "triples", "softcap and scale"))
    assert NAMED["plain torch"].why_not(triples) is None
    assert "Hopper" in NAMED["quack"].why_not(pairs)
    if importlib.util.find_spec("liger_kernel") is not None:
        assert "chosen and rejected only" in NAMED["Liger DPO"].why_not(triples)
        assert "softcap" in NAMED["Liger DPO"].why_not(capped)
        assert "GPU" in NAMED["Liger linear CE"].why_not(triples)


def test_a_reference_that_does_not_cancel_is_not_given_to_one_that_ignores_it():
    problem = Problem(SETTINGS["pairs"])
    problem.ref_logp[0] += 1.0
    reason = NAMED["Liger DPO"].why_not(problem)
    assert reason is not None and ("known" in reason or "not installed" in reason)


@pytest.mark.parametrize("comparison", training.CONTESTANTS)
def test_all_trainers_of_whole_steps_find_the_same_first_loss_and_gradient(comparison, tmp_path):
    losses, gradients = {}, {}
    for name in training.CONTESTANTS[comparison]:
        if training.why_not(name, comparison):
            continue
        setting = training.Setting("tiny", comparison, batch=2, steps=1, lengths=(40, 16))
        work = work_of("tiny", 2, pairs=comparison == "pairs", lengths=setting.lengths)
        with training.quiet():
            trainer = training.trainer_of(name, setting, *work, str(tmp_path / name))
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            loss = trainer.compute_loss(trainer.model, batch)
        if name != "TRL DPOTrainer":
            assert trainer.layout_choice.layout.name == ("shared" if name == "fused" else "padded")
        responses = 3 if comparison == "triples" else 2
        assert training.padded_tokens(batch) == 2 * responses * (40 + 16)
        loss.backward()
        losses[name], gradients[name] = float(loss.detach()), trainer.model.get_input_embeddings().weight.grad
    assert abs(losses["fused"] - math.log(2)) > 0.01, "log 2 says nothing about the log-probs"
    for name, loss in losses.items():
        assert abs(loss - losses["fused"]) <= SAME_LOSS["float32"] / 10  # tiny answers: a tenth of the tokens
        # Rounding alone: the largest entry moves by less than a thousandth.
        apart = (gradients[name] - gradients["fused"]).abs().max()
        assert apart <= 1e-3 * gradients["fused"].abs().max(), name


def test_the_interval_of_the_median_covers_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 9, generator=generator)
    covered = sum(low <= 0 <= high for _, low, high in (median_interval(row.tolist()) for row in draws))
    # Of 9 values the second smallest and largest miss with probability 2 (1 + 9) / 2^9 = 3.9 %; 4 standard deviations.
    assert abs(covered / 4000 - (1 - 20 / 512)) < 4 * (0.039 * 0.961 / 4000) ** 0.5
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)  # too few for 95 %: the whole range
