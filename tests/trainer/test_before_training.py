"""What would fail hours into a run is one line before its first pass over the data."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tiny_rows
from tiny_runs import SETTINGS, training_lines, wrpo_trainer
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, cli
from wrpo.data.collation import PreferenceCollator
from wrpo.training import reference_trainer as module
from wrpo.training.metrics import NEEDS, names_of_metrics, preference_metrics

ROWS = [{"prompt": f"{n} + 3?", "chosen": ["five, of course", "5"], "rejected": "6"} for n in range(4)]
EVALUATED = {"eval_dataset": tiny_rows(2), "eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVALUATED, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_pass(request, monkeypatch):
    """A refusal comes before the reference is computed."""
    if "refused" in request.node.name:

        def forbidden(*_args, **_options):
            raise AssertionError("a pass over the data")

        monkeypatch.setattr(module, "sequence_logp", forbidden)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "model", tiny_model(vocab_size=len(tiny_tokenizer())))


def save(folder: Path, model: nn.Module, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def command(name: str, folder: Path, *flags: str) -> int:
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if name == "logp":
        return cli.main(["logp", str(rows), "-o", str(folder.parent / "out.jsonl"), "--models", str(folder), *flags])
    place = ["--model_name_or_path", str(folder), "--output_dir", str(folder.parent / "out")]
    quick = ["--use_cpu", "--draw_curves", "false", "--max_steps", "1", "--save_strategy", "no"]
    return cli.main([name, str(rows), *place, *quick, *flags])


# -- rows that the model cannot take ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "sft", "logp"])
def test_a_token_of_the_data_beyond_the_embedding_is_refused_by_its_name(name, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_tokens(["five,"])
    save(tmp_path / "model", model, tokenizer)
    capsys.readouterr()
    assert command(name, tmp_path / "model") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"the token id {len(tokenizer) - 1} ('five,') is beyond the model's embedding" in last
    assert "resize_token_embeddings" in last


@pytest.mark.parametrize("name", ["train", "dpo", "sft", "logp"])
def test_padding_beyond_the_embedding_is_replaced_and_what_is_saved_can_be_loaded(name, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save(tmp_path / "model", model, tokenizer)
    assert command(name, tmp_path / "model", *(() if name == "logp" else ["--per_device_train_batch_size", "4"])) == 0
    if name != "logp":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id == 3


@pytest.mark.parametrize("name", ["train", "sft", "logp"])
def test_a_row_longer_than_learned_positions_is_refused_with_the_limit(name, tmp_path, capsys):
    assert command(name, save_short(tmp_path)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "and the model has 14 positions. Set max_length to 14 or less" in last


@pytest.mark.parametrize("name", ["train", "sft", "logp"])
def test_a_row_as_long_as_the_learned_positions_is_taken(name, tmp_path):
    assert command(name, save_short(tmp_path), "--max_length", "14") == 0


def save_short(folder: Path) -> Path:
    model = tiny_model("gpt2-tied-learned-positions", vocab_size=len(tiny_tokenizer()), max_position_embeddings=14)
    return save(folder / "model", model)


def test_the_eval_data_are_looked_at_too_when_refused(tmp_path):
    rows = [{**tiny_rows(1)[0], "prompt_ids": [97]}]
    with pytest.raises(ValueError, match=r"^eval_b data: the token id 97 is beyond"):
        wrpo_trainer(tmp_path, eval_dataset={"a": tiny_rows(1), "b": rows}, reference="precompute")


# -- nothing to train -------------------------------------------------------------------------------------------------


def test_a_model_without_a_trained_parameter_is_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter is trained \(requires_grad\)"):
        wrpo_trainer(tmp_path, model, reference="precompute")


def test_a_frozen_model_can_be_evaluated(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(tiny_model().requires_grad_(False), args, eval_dataset=tiny_rows(2))
    assert trainer.evaluate()["eval_loss"] > 0


# -- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "sft"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--report_to", "wandb"], "report_to ['wandb']: RuntimeError: WandbCallback requires wandb to be installed"),
        (["--report_to", "nonsense"], "report_to: expected one of all, none, "),
        (["--optim", "adamw_8bit"], "optim 'adamw_8bit', optim_args None: "),
        (["--optim", "galore_adamw", "--optim_target_modules", "q_proj"], "galore"),
        (["--optim", "schedule_free_adamw"], "schedulefree"),
        (["--deepspeed", "nothing.json"], "deepspeed 'nothing.json': "),
        (["--use_liger_kernel", "true"], "liger"),
        (["--torch_compile_mode", "fastest"], "torch_compile_mode: expected one of default, "),
        (["--torch_compile_backend", "nothing"], "torch_compile_backend: expected one of "),
        (
            ["--accelerator_config", "nothing"],
            "accelerator_config: expected a mapping or a JSON file of one, got 'nothing'",
        ),
        (
            ["--load_best_model_at_end", "true"],
            "load_best_model_at_end needs evaluations and checkpoints, got eval_str",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_whose_package_or_word_is_not_there_is_refused(name, flags, words, folder, capsys):
    capsys.readouterr()
    assert command(name, folder, *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"wrpo {name}: ")
    assert words in last


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def absent(_trainer, *_args, **_options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(Trainer, "init_hf_repo", absent)
    with pytest.raises(ValueError, match=r"^push_to_hub: ConnectionError: Name or service not known$"):
        wrpo_trainer(tmp_path, push_to_hub=True)


# -- optimizer and schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adam_beta2": 2.0}, "optim 'adamw_torch_fused', optim_args None: ValueError: Invalid beta parameter"),
        (
            {"optim": "adagrad", "optim_args": "lr_decay=0.1, nonsense=3"},
            "optim 'adagrad', optim_args 'lr_decay=0.1, nonsense=3': ValueError: 'nonsense=3' would change nothing",
        ),
        ({"optim": "adagrad", "optim_args": "lr_decay=-1"}, "Invalid lr_decay value"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "lr_scheduler_type 'cosine', lr_scheduler_kwargs {'nonsense': 1}: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type 'warmup_stable_decay', lr_scheduler_kwargs"),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made_is_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=r"^optim|^lr_scheduler_type") as caught:
        wrpo_trainer(tmp_path, reference="precompute", **settings)
    assert words in str(caught.value)


# -- the metric of the best model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**BEST, "metric_for_best_model": "accuracy"}, "expected a value of the evaluation, got 'accuracy'; They are"),
        ({**BEST, "metric_for_best_model": "rewards/accuracy"}, "They are eval_loss, eval_rewards/chosen"),
        ({**BEST, "metric_for_best_model": "rewards/acuracies"}, "did you mean 'eval_rewards/accuracies'? They are"),
        ({**BEST, "eval_dataset": {"a": tiny_rows(2)}}, "got 'loss'; They are eval_a_loss, eval_a_rewards/chosen"),
        (
            {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "bleu"},
            "got 'bleu'",
        ),
        (
            {**BEST, "rows": tiny_rows(2, sources=0), "eval_dataset": tiny_rows(2, sources=0),
             "metric_for_best_model": "rewards/source_chosen"},
            "got 'rewards/source_chosen'",
        ),
    ],
)  # fmt: skip
def test_a_metric_that_the_evaluation_does_not_give_is_refused_with_those_it_gives(settings, words, tmp_path):
    with pytest.raises(ValueError, match=r"^metric_for_best_model: ") as caught:
        wrpo_trainer(tmp_path, reference="precompute", **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "data"),
    [("loss", tiny_rows(2)), ("eval_rewards/pivot_accuracies", tiny_rows(2)), ("b_loss", {"b": tiny_rows(2)})],
)
def test_a_value_of_the_evaluation_is_a_metric(metric, data, tmp_path):
    trainer = wrpo_trainer(tmp_path, **{**BEST, "eval_dataset": data}, metric_for_best_model=metric, max_steps=2)
    trainer.train()
    assert trainer.state.best_global_step in (1, 2)


def test_sft_evaluates_its_loss_alone_the_rest_is_refused(tmp_path):
    data = {"train_dataset": tiny_rows(2), "eval_dataset": tiny_rows(2)}
    settings = {**SETTINGS, **BEST, "output_dir": str(tmp_path)}
    settings.pop("eval_dataset")
    with pytest.raises(ValueError, match="They are eval_loss, eval_runtime"):
        SFTTrainer(tiny_model(), SFTConfig(**settings, metric_for_best_model="rewards/chosen"), **data)


@pytest.mark.parametrize("numbers", [{}, {"sources": 0}, {"targets": 0}, {"sources": 2, "rejected": 3}])
def test_the_names_of_the_values_are_those_that_are_logged(numbers):
    rows = tiny_rows(3, **numbers)
    batch = PreferenceCollator(0)(rows)
    count = len(batch["role"])
    values = preference_metrics(torch.arange(float(count)), torch.arange(float(count)), batch, 0.5)
    assert list(values) == list(NEEDS)
    assert [name for name, value in values.items() if value.holds.any()] == names_of_metrics(rows)


# -- rows of like length ----------------------------------------------------------------------------------------------


def padding(trainer) -> int:
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_of_like_length_are_put_together(form, strategy, tmp_path):
    if strategy not in str(WRPOConfig.__dataclass_fields__["train_sampling_strategy"].metadata["help"]):
        pytest.skip(f"this transformers has no {strategy}")
    rows = form(tiny_rows(64))
    given = {"rows": rows, "layout": "padded", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    grouped = wrpo_trainer(tmp_path, train_sampling_strategy=strategy, **given)
    plain = wrpo_trainer(tmp_path, **given)
    assert padding(grouped) < 0.8 * padding(plain)
    grouped.train()
    assert grouped.state.global_step == 4


@pytest.mark.parametrize(("layout", "of_responses"), [("padded", max), ("shared", sum)])
def test_a_row_is_as_long_as_its_prompt_and_the_responses_that_stand_beside_it(layout, of_responses, tmp_path):
    rows = tiny_rows(6)
    options = {"layout": layout, "train_sampling_strategy": "group_by_length", "eval_dataset": rows}
    trainer = wrpo_trainer(tmp_path, rows=rows, **options)
    expected = [len(row["prompt_ids"]) + of_responses(map(len, row["response_ids"])) for row in rows]
    for sampler in (trainer._get_train_sampler(), trainer._get_eval_sampler(rows)):
        assert isinstance(sampler, LengthGroupedSampler)
        assert sampler.lengths == expected
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, rel=1e-4)


def test_a_stream_keeps_its_order(tmp_path):
    stream = datasets.Dataset.from_list(tiny_rows(4)).to_iterable_dataset()
    trainer = wrpo_trainer(tmp_path, rows=stream, train_sampling_strategy="group_by_length", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex_attention trains on a GPU")
def test_attention_that_cannot_train_on_a_cpu_is_refused_before_training(tmp_path):
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention': torch has no backward of it on a CPU; use sdpa"):
        wrpo_trainer(tmp_path, model)


class FromAFile(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_rows(4))


@pytest.mark.parametrize("loss_type", ["sigmoid", "dpo"])  # dpo leaves the sources out
@pytest.mark.parametrize(
    "stream",
    [FromAFile, lambda: datasets.IterableDataset.from_generator(lambda: iter(tiny_rows(4)))],
    ids=["torch", "datasets"],
)
def test_streams_of_tokenised_rows_train(stream, loss_type, tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=stream(), loss_type=loss_type, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_data_sets_that_give_tensors_train_as_those_that_give_lists(form, tmp_path):
    rows = datasets.Dataset.from_list(tiny_rows(4))
    plain, formatted = (wrpo_trainer(tmp_path, rows=data, max_steps=2) for data in (rows, rows.with_format(form)))
    plain.train()
    formatted.train()
    assert training_lines(plain) == training_lines(formatted)


def test_a_reference_model_that_has_no_row_for_a_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train data, ref_model: the token id 96 is beyond the model's embedding"):
        wrpo_trainer(tmp_path, ref_model=tiny_model(vocab_size=50))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_policy_is_no_reference_of_itself(adapted, tmp_path):
    model = tiny_model()
    policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if adapted else model
    with pytest.raises(ValueError, match="ref_model is the model that is trained: leave it out"):
        wrpo_trainer(tmp_path, policy, ref_model=model)
