"""A setting that nothing reads, for want of another one that would ask for it, is refused by name; beside that it is
taken."""

from __future__ import annotations

import pytest

import wrpo.building.command
import wrpo.evaluation.command
import wrpo.scoring.command
import wrpo.training.command
from wrpo import DPOConfig, WRPOConfig
from wrpo.settings import SettingsError

ANSWERS = ["a.jsonl", "-o", "out"]
COMMANDS = {
    "train": (lambda words: wrpo.training.command.parse("train", WRPOConfig, words)),
    "dpo": (lambda words: wrpo.training.command.parse("dpo", DPOConfig, words)),
    "build": (lambda words: wrpo.building.command.parse(words)),
    "score": (lambda words: wrpo.scoring.command.parse(words)),
    "eval": (lambda words: wrpo.evaluation.command.parse(words)),
}
NEEDED = {
    "train": ["--model_name_or_path", "m", "--output_dir", "out", "--use_cpu"],
    "dpo": ["--model_name_or_path", "m", "--output_dir", "out", "--use_cpu"],
    "build": ANSWERS,
    "score": ANSWERS,
    "eval": ["-o", "out"],
}
FILE, HUB = "--train_file t.jsonl", "--dataset_name d"
TRIPLES = "--triples t.jsonl --policy p --reference r"
# command, the setting, what stands beside it where nothing reads it, and where something does
IDLE = [
    ("train", "ref_model_mixup_alpha 0.5", FILE, "--sync_ref_model"),
    ("train", "ref_model_sync_steps 8", FILE, "--sync_ref_model"),
    ("train", "discopop_tau 0.1", FILE, "--loss_type discopop"),
    ("train", "f_alpha_divergence_coef 0.7", f"{FILE} --f_divergence_type js_divergence", None),
    ("train", "f_alpha_divergence_coef 0.7", FILE, "--f_divergence_type alpha_divergence"),
    ("train", "alpha_schedule cosine", f"{FILE} --loss_type dpo --alpha 0", None),
    ("train", "alpha_goal_accuracy 0.9", FILE, "--alpha_schedule adaptive"),
    ("train", "alpha_start 0.05", f"{FILE} --alpha_schedule constant", None),
    ("train", "alpha_warmup_ratio 0.5", f"{FILE} --alpha_schedule constant", None),
    ("train", "alpha 0.3", f"{FILE} --loss_type dpo", None),
    ("train", "alpha_start 0.05", f"{FILE} --loss_type dpo", None),
    ("train", "alpha_warmup_ratio 0.5", f"{FILE} --loss_type dpo", None),
    ("train", "alpha_warmup_ratio 0.5", f"{FILE} --alpha 0", "--alpha_start 0.3"),
    ("dpo", "alpha_warmup_ratio 0.5", FILE, None),
    ("train", "source_temperature 2.0", FILE, "--source_weighting reward"),
    ("train", "performance_decay 0.5", f"{FILE} --source_weighting reward", None),
    ("train", "performance_decay 0.5", FILE, "--source_weighting margin"),
    ("train", "reference_cache_dir kept", f"{FILE} --reference copy", None),
    ("train", "reference_cache_dir kept", f"{FILE} --loss_type simpo", None),
    ("train", "reference_cache_dir kept", f"{FILE} --sync_ref_model", None),
    ("train", "dataset_split train[:9]", FILE, None),
    ("train", "train_split other", HUB, None),
    ("train", "eval_split other", FILE, "--eval_file e.jsonl"),
    ("build", "ties_margin 0.1", "", "--ties source"),
    ("build", "weight_temperature 0.5", "", "--num_sources 2"),
    ("build", "tokenizer t", "", "--max_tokens 9"),
    ("score", "label 1", "--verifier m:f", None),
    ("score", "torch_dtype float32", "--judge judge.yaml", None),
    ("eval", "samples 4", "a.jsonl", "--sources s.yaml --prompts p.jsonl"),
    ("eval", "keep topic", "a.jsonl", "--sources s.yaml --prompts p.jsonl"),
    ("eval", "baseline m", TRIPLES, "a.jsonl"),
    ("eval", "verifier m:f", TRIPLES, "--sources s.yaml --prompts p.jsonl"),
    ("eval", "policy p", "a.jsonl", "--triples t.jsonl --reference r"),
    ("eval", "beta 0.1", "a.jsonl", TRIPLES),
    ("eval", "batch_size 8", "a.jsonl", TRIPLES),
    ("eval", "torch_dtype float32", "a.jsonl --judge judge.yaml", "a.jsonl --reward_model rm"),
    ("eval", "trust_remote_code true", "a.jsonl", TRIPLES),
]


@pytest.mark.parametrize(("command", "setting", "idle", "asked"), IDLE, ids=lambda value: value and value.split()[0])
def test_a_setting_that_nothing_reads_is_refused_by_name_and_taken_where_something_does(command, setting, idle, asked):
    name, value = setting.split()
    words = [*NEEDED[command], f"--{name}", value]
    with pytest.raises(SettingsError, match=rf"^(--)?{name}\b.* is for .*would change nothing"):
        COMMANDS[command]([*idle.split(), *words])
    if asked is not None:
        COMMANDS[command]([*asked.split(), *(idle.split() if command == "train" else []), *words])


@pytest.mark.parametrize("alpha", ["0", "0.1"], ids=["what dpo does", "the default"])
def test_dpo_takes_an_alpha_that_says_nothing_else(alpha):
    words = [*NEEDED["train"], *FILE.split(), "--loss_type", "dpo", "--alpha", alpha]
    assert COMMANDS["train"](words)[2].loss_type == "dpo"
