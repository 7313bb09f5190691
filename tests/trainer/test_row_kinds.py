"""A row is a prompt and any number of responses: every kind of row trains, and all of them in one data set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scored_answers import answers, write_lines
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, SETTINGS, training_lines, weights, wrpo_trainer
from tiny_tokenizer import tiny_tokenizer

from wrpo import DPOConfig, WRPOTrainer, cli
from wrpo.data import load_examples, tokenize_examples
from wrpo.training.response_weights import response_weights

# name: (number of sources, of targets, of rejected), and what each weighs with alpha 0.3
KINDS = {
    "pair": ((0, 1, 1), [1.0, -1.0]),
    "triple": ((1, 1, 1), [0.3, 0.7, -1.0]),
    "two sources": ((2, 1, 1), [0.15, 0.15, 0.7, -1.0]),
    "several rejected": ((0, 1, 3), [1.0, -1 / 3, -1 / 3, -1 / 3]),
    "no target": ((2, 0, 2), [0.5, 0.5, -0.5, -0.5]),
}


def mixed_rows(copies: int = 1) -> list[dict]:
    """One row of each kind, all of different tokens."""
    rows = []
    for seed in range(copies):
        for place, ((sources, targets, rejected), _) in enumerate(KINDS.values()):
            rows += tiny_rows(1, sources=sources, targets=targets, rejected=rejected, seed=10 * seed + place)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_each_response_weighs_what_its_role_says(kind):
    (sources, targets, rejected), expected = KINDS[kind]
    batch = preference_batch(tiny_rows(2, sources=sources, targets=targets, rejected=rejected))
    got = response_weights(batch, 0.3)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), torch.tensor(expected * 2))


def test_kinds_mixed_in_one_batch_have_the_loss_that_each_has_by_itself(tmp_path):
    """From the models' own logits in float64, row by row."""
    rows, policy, reference = mixed_rows(), tiny_model(seed=0), tiny_model(seed=1)
    trainer = wrpo_trainer(tmp_path, policy, rows, ref_model=reference, alpha=0.3, alpha_schedule="constant", beta=0.1)
    got = trainer.compute_loss(trainer.model.eval(), preference_batch(rows)).item()
    losses = []
    for row, (_, expected) in zip(rows, KINDS.values(), strict=True):
        batch = preference_batch([row])
        with torch.no_grad():
            ratio = plain_logp(policy, batch) - plain_logp(reference.eval(), batch)
        losses.append(-F.logsigmoid(0.1 * (torch.tensor(expected, dtype=torch.float64) * ratio).sum()))
    assert got == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_mixed_kinds_give_the_same_gradient_however_a_step_is_dealt_out(batch_size, tmp_path):
    whole = wrpo_trainer(tmp_path / "whole", rows=mixed_rows(2), per_device_train_batch_size=10, beta=1.0,
                         alpha=0.3, alpha_schedule="constant", **ONE_GRADIENT)  # fmt: skip
    start = weights(whole)
    whole.train()
    parts = wrpo_trainer(tmp_path / "parts", rows=mixed_rows(2), per_device_train_batch_size=batch_size, beta=1.0,
                         gradient_accumulation_steps=10 // batch_size, alpha=0.3, alpha_schedule="constant",
                         **ONE_GRADIENT)  # fmt: skip
    parts.train()
    for name, expected in weights(whole).items():
        change = (expected - start[name]).abs().max().item()
        torch.testing.assert_close(weights(parts)[name], expected, rtol=0, atol=1e-5 * change + 1e-7, msg=name)


def odds(mean):
    return torch.log(mean.exp() / (1 - mean.exp()))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "bco_pair", "apo_zero", "cpo", "orpo"])
def test_plain_pairs_train_by_dpo_and_its_relatives(loss_type, tmp_path):
    """The loss of the first step, by hand, and a lower one at the end."""
    rows, policy = tiny_rows(sources=0), tiny_model()
    args = DPOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, num_train_epochs=6,
        **{**SETTINGS, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
    )  # fmt: skip
    batch = preference_batch(rows)
    with torch.no_grad():
        logp = plain_logp(policy, batch)
    length = (batch["labels"] != -100).sum(1)
    score = {"simpo": logp / length, "cpo": logp, "orpo": odds(logp / length)}.get(loss_type, torch.zeros_like(logp))
    token_mean = -logp[::2].sum() / length[::2].sum()
    margin = args.beta * (score[::2] - score[1::2]) - args.gamma
    expected = {
        "sigmoid": -F.logsigmoid(margin), "simpo": -F.logsigmoid(margin), "hinge": torch.relu(1 - margin),
        "ipo": (margin / 0.1 - 1 / (2 * 0.1)) ** 2, "apo_zero": 1 + 0 * margin, "bco_pair": -2 * F.logsigmoid(margin),
        "cpo": token_mean - F.logsigmoid(margin), "orpo": token_mean - 0.1 * F.logsigmoid(margin / 0.1),
    }[loss_type]  # fmt: skip
    trainer = WRPOTrainer(policy, args, train_dataset=rows)
    trainer.train()
    lines = training_lines(trainer)
    assert lines[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["rewards/accuracies"] == lines[-1]["rewards/pivot_accuracies"] == 1.0


@pytest.mark.parametrize(
    ("settings", "sequences"),
    [
        ({"loss_type": "dpo"}, 2),
        ({"alpha": 0.0}, 2),
        ({"alpha": 1.0, "alpha_schedule": "constant"}, 2),
        ({"alpha": 0.1}, 3),
    ],
    ids=["dpo", "alpha 0", "alpha 1", "wrpo"],
)
@pytest.mark.parametrize("reference", ["copy", "precompute"])
def test_a_response_that_would_weigh_nothing_does_not_go_through_the_model(settings, sequences, reference, tmp_path):
    trainer = wrpo_trainer(tmp_path, reference=reference, max_steps=1, layout="padded", **settings)
    seen = []
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    trainer.train()
    assert seen == [2 * sequences], "two rows"
    assert all(len(trainer.train_dataset[i]["response_ids"]) == sequences for i in range(8))


def test_a_row_whose_only_preferred_answer_is_a_sources_is_kept_by_dpo(tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=mixed_rows(), loss_type="dpo", max_steps=1)
    kept = [trainer.train_dataset[i]["role"] for i in range(5)]
    assert kept[1] == kept[2] == ["target", "rejected"]
    assert kept[4] == ["source", "source", "rejected", "rejected"]


@pytest.mark.parametrize("settings", [{"alpha": 0.1}, {"alpha_start": 0.1, "alpha_schedule": "cosine"}])
def test_dpo_has_no_alpha(settings, tmp_path):
    with pytest.raises(ValueError, match="alpha and alpha_start must be 0 for DPO"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_the_reference_of_mixed_rows_is_the_same_before_training_and_beside_it(tmp_path):
    rows = mixed_rows()
    beside = wrpo_trainer(tmp_path / "copy", rows=rows, reference="copy")
    before = wrpo_trainer(tmp_path / "precompute", rows=rows, reference="precompute")
    batch = preference_batch(rows)
    expected = beside.reference(beside.model, batch)
    kept = before.reference(before.model, preference_batch([before.train_dataset[i] for i in range(5)]))
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)


def test_a_resumed_run_of_mixed_rows_is_bit_equal_to_the_uninterrupted_one(tmp_path):
    def run(folder: str, resume: bool = False) -> WRPOTrainer:
        trainer = wrpo_trainer(
            tmp_path / folder, tiny_model("gpt2-tied-learned-positions", resid_pdrop=0.3), mixed_rows(2),
            num_train_epochs=2, learning_rate=1e-2, save_strategy="steps", save_steps=3, beta=0.5,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return trainer

    whole, resumed = run("whole"), run("resumed", resume=True)
    assert whole.state.global_step == 10
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert training_lines(resumed) == training_lines(whole)


def test_ties_that_wrpo_build_wrote_train_with_the_whole_weight_on_their_sources_from_the_first_step(tmp_path):
    """Two sources for each prompt; alpha is 0 for the triple at step 0, and 1 for the ties."""
    candidates = [row for name in "abc" for row in answers(name, big=[1.0], small=[0.75], target=[0.0, 0.0])]
    candidates += answers("triple", big=[1.0], small=[0.75], target=[0.5, 0.0])
    path = write_lines(candidates, tmp_path / "candidates.jsonl")
    flags = ["--ties", "source", "--num_sources", "2", "--sft_share", "0"]
    assert cli.main(["build", str(path), "-o", str(tmp_path), *flags]) == 0
    tokenizer, beta = tiny_tokenizer(), 0.5
    rows = list(tokenize_examples(load_examples(tmp_path / "triples.jsonl"), tokenizer))
    weight = {4: [0.0, 0.0, 1.0, -1.0], 3: [0.5, 0.5, -1.0]}  # by the number of responses
    assert sorted(len(row["response_ids"]) for row in rows) == [3, 3, 3, 4]
    policy, reference = (tiny_model(seed=s, vocab_size=len(tokenizer), max_position_embeddings=128) for s in (0, 1))
    losses = []
    for row in rows:
        batch = preference_batch([row])
        with torch.no_grad():
            ratio = plain_logp(policy, batch) - plain_logp(reference, batch)
        of_row = torch.tensor(weight[len(row["response_ids"])], dtype=torch.float64)
        losses.append(-F.logsigmoid(beta * (of_row * ratio).sum()))
    trainer = wrpo_trainer(
        tmp_path, policy, rows, ref_model=reference, processing_class=tokenizer,
        per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, alpha=0.5, beta=beta,
    )  # fmt: skip
    trainer.train()
    lines = training_lines(trainer)
    assert lines[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert lines[-1]["loss"] < 0.1 < lines[0]["loss"]
    assert lines[-1]["rewards/accuracies"] == 1.0


def test_several_losses_at_once_are_their_weighted_sum_over_triples(tmp_path):
    """As MPO mixes them; the rewards in the log are those of one loss alone."""
    batch = preference_batch(tiny_rows(2))

    def first(**loss):
        trainer = wrpo_trainer(tmp_path, tiny_model(), rows=tiny_rows(2), ref_model=tiny_model(seed=1), **loss)
        return trainer.compute_loss(trainer.model.eval(), batch).item()

    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    expected = sum(weight * first(loss_type=name) for name, weight in weights.items())
    assert first(loss_type=[*weights], loss_weights=[*weights.values()]) == pytest.approx(expected, rel=1e-5)
