"""TRL's trainers with and without our head: the same losses and metrics over several steps."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from wrpo_kernels.integrations import trl as integration

NEEDS_TRL = "trl 1.16 is not installed (pip install trl==1.16.0)"
ROWS = [
    ("What is 2 + 2?", "It is 4.", "hello"),
    ("the sum of two and three", "five, of course.", "two"),
    ("hello", "world", "2 + 3"),
]
PAIRS = [{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in ROWS * 2]
STEPS = 3


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    integration.uninstall()


@pytest.fixture
def trl() -> ModuleType:
    pytest.importorskip("trl", reason=NEEDS_TRL)
    import trl

    return trl


def length_reward(completions: list, **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
GOOD = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
BAD = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in PAIRS]
JUDGED = [{**row, "label": rows is GOOD} for rows in (GOOD, BAD) for row in rows]
SAMPLED = {"num_generations": 2, "max_completion_length": 6}
# trainer: its data and its own settings
TRAINERS: dict[str, tuple[list[dict], dict[str, Any]]] = {
    "DPO": (PAIRS, {"beta": 0.5}),
    "DPO, several losses": (PAIRS, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.5, 0.3, 1.0]}),
    "DPO, weighted by the policy": (PAIRS, {"use_weighting": True, "loss_type": "ipo"}),
    "SFT": (GOOD, {}),
    "KTO": (JUDGED, {}),
    "GRPO": (PROMPTS, {**SAMPLED, "beta": 0.1}),
    "GRPO, an entropy bonus": (PROMPTS, {**SAMPLED, "entropy_coef": 0.3}),
    "GRPO, tokens of high entropy": (PROMPTS, {**SAMPLED, "top_entropy_quantile": 0.5}),
    "RLOO": (PROMPTS, SAMPLED),
}


def trained(trl: ModuleType, name: str, folder: Any, **options: Any) -> tuple[list[dict], list[torch.Tensor]]:
    """The log's lines and the weights after a few steps from the same start."""
    from datasets import Dataset

    kind = name.split(",")[0]
    rows, settings = TRAINERS[name]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "model")  # which TRL loads again as the reference
    tokenizer.save_pretrained(folder / "model")
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=False,
        **{"bf16": False, **settings, **options},
    )
    of_rewards = {"reward_funcs": length_reward} if kind in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **of_rewards,
    )
    trainer.train()
    timings = ("runtime", "time", "per_second", "flos", "per_token")
    lines = [
        {key: value for key, value in line.items() if not any(word in key for word in timings)}
        for line in trainer.state.log_history
    ]
    return lines, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_same_lines(got: list[dict], expected: list[dict]) -> None:
    assert len(got) == len(expected) >= STEPS
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("name", TRAINERS)
def test_losses_metrics_and_weights_are_those_of_trls_own_head(name, trl, tmp_path):
    expected, their_weights = trained(trl, name, tmp_path / "theirs")
    integration.install()
    got, weights = trained(trl, name, tmp_path / "ours")
    assert_same_lines(got, expected)
    for ours, theirs in zip(weights, their_weights, strict=True):
        # Adam makes whole steps of gradients that are nothing but rounding; such weights are few.
        assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.02


def test_a_small_budget_trains_the_same(trl, tmp_path):
    expected, _ = trained(trl, "DPO", tmp_path / "theirs")
    integration.install(budget_bytes=4096)
    got, _ = trained(trl, "DPO", tmp_path / "ours")
    assert_same_lines(got, expected)


def test_bfloat16_autocast_multiplies_in_bfloat16_and_stays_near(trl, tmp_path):
    expected, _ = trained(trl, "DPO", tmp_path / "theirs", bf16=True)
    integration.install()
    got, _ = trained(trl, "DPO", tmp_path / "ours", bf16=True)
    for ours, theirs in zip(got[:STEPS], expected, strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)


# What `install` does to a TRL, on a stand-in that has the same names; it needs none.


class Theirs:
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=(),
    ):  # fmt: skip
        raise AssertionError


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str, function: type = Theirs) -> ModuleType:
    utils = ModuleType("trl.trainer.utils")
    utils._ChunkedLogProbFunction, utils._use_triton = function, lambda device: False
    trainer, trl = ModuleType("trl.trainer"), ModuleType("trl")
    trainer.utils, trl.trainer = utils, trainer
    for module in (trl, trainer, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration, "version", lambda _: version)
    return utils


def test_uninstall_gives_trl_its_own_functions_back(monkeypatch):
    utils = stand_in(monkeypatch, "1.16.0")
    theirs = (utils._ChunkedLogProbFunction, utils._use_triton)
    integration.install()
    integration.install(budget_bytes=1 << 20)  # the second one must not take the first for TRL's
    assert utils._ChunkedLogProbFunction is not Theirs
    assert utils._use_triton("cpu")
    integration.uninstall()
    integration.uninstall()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == theirs


def test_a_version_that_was_not_tried_warns_and_the_known_one_does_not(monkeypatch):
    stand_in(monkeypatch, "1.17.2")
    with pytest.warns(RuntimeWarning, match=r"TRL 1\.16, not with 1\.17\.2"):
        integration.install()
    integration.uninstall()
    stand_in(monkeypatch, "1.16.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.install()


def test_a_trl_that_makes_its_log_probs_otherwise_is_refused(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight):
            raise AssertionError

    utils = stand_in(monkeypatch, "2.0.0", Other)
    with pytest.raises(RuntimeError, match=r"TRL 2\.0\.0 does not make its log-probs where TRL 1\.16 does"):
        integration.install()
    assert utils._ChunkedLogProbFunction is Other


def test_without_trl_the_import_error_is_pythons(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="trl"):
        integration.install()


def test_a_head_that_zero_3_takes_away_is_refused(monkeypatch):
    utils = stand_in(monkeypatch, "1.16.0")
    integration.install()
    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.ds_id = 0
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*uninstall"):
        utils._ChunkedLogProbFunction.apply(torch.randn(3, 4), weight, None, torch.zeros(3).long(), 1.0, 32768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_statistics_are_those_of_whole_logits(monkeypatch, dtype):
    utils = stand_in(monkeypatch, "1.16.0")
    integration.install()
    hidden, weight, bias, targets = torch.randn(9, 8), torch.randn(31, 8), torch.randn(31), torch.randint(0, 31, (9,))
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    logp, *found = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 32768, 5.0, 0.9, names)
    scores = (5.0 * torch.tanh(((hidden @ weight.T).double() + bias.double()) * 0.9 / 5.0) / 0.7).detach()
    log_share = scores.log_softmax(-1)
    expected = [
        -(log_share.exp() * log_share).sum(-1),
        (2 * log_share).logsumexp(-1),
        scores.mean(-1),
        scores.argmax(-1) == targets,
    ]
    torch.testing.assert_close(logp.double(), log_share.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    for name, got, truth in zip(names, found, expected, strict=True):
        torch.testing.assert_close(got.to(truth.dtype), truth, rtol=1e-5, atol=1e-5, msg=name)
    only = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 32768, 5.0, 0.9, ("mean_logits",))
    assert [x is None for x in only] == [False, True, True, False, True]


def test_the_installed_version_is_one_that_was_tried(trl):
    found = importlib.metadata.version("trl")
    if ".".join(found.split(".")[:2]) not in integration.KNOWN:
        pytest.skip(f"TRL {found} is installed; tried is {integration.KNOWN}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        integration.install()
