"""A command's settings mean the same as flags and in a file, and a mistake names the field, the wish and what came."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from contextlib import suppress

import pytest

import wrpo.building.command
import wrpo.evaluation.command
import wrpo.reference.command
import wrpo.sampling.command
import wrpo.scoring.command
import wrpo.training.command
from wrpo import SFTConfig, WRPOConfig, cli
from wrpo.settings import DataSettings, ModelSettings, SettingsError, check_range, knob, parse_settings


@pytest.fixture
def settings(tmp_path):
    """Settings from the lines of a YAML file and from flags, in a folder of their own."""

    def parse(lines: str, *flags: str, config_class: type = WRPOConfig):
        path = tmp_path / "config.yaml"
        path.write_text(f"model_name_or_path: m\ntrain_file: t.jsonl\noutput_dir: {tmp_path}\nuse_cpu: true\n{lines}")
        return parse_settings((ModelSettings, DataSettings, config_class), [str(path), *flags], "wrpo train")

    return parse


TYPED = {
    "a float without a point": ("learning_rate: 3e-7", "learning_rate", 3e-7),
    "a float that is a whole number": ("beta: 10", "beta", 10.0),
    "an integer": ("max_length: 512", "max_length", 512),
    "null for no limit": ("max_length: null", "max_length", None),
    "none for no limit": ("max_length: none", "max_length", None),
    "true": ("length_normalize: true", "length_normalize", True),
    "off": ("draw_curves: off", "draw_curves", False),
    "text": ("loss_type: ipo", "loss_type", "ipo"),
    "text that starts with a dash": ("run_name: -x-", "run_name", "-x-"),
    "a mapping": ('lr_scheduler_kwargs: {"a": 1}', "lr_scheduler_kwargs", {"a": 1}),
}


@pytest.mark.parametrize(("line", "name", "value"), TYPED.values(), ids=TYPED)
def test_a_yaml_value_has_the_type_of_its_field(settings, line, name, value):
    config = settings(line)[2]
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


def test_the_settings_of_model_and_data_come_from_the_same_file(settings):
    model, data, _ = settings(
        "lora_r: 8\nlora_target_modules: [q_proj, lm_head]\n"
        "skip_bad_rows: true\nchat_template_kwargs: {thinking: false}"
    )
    assert (model.lora_r, model.lora_target_modules) == (8, ["q_proj", "lm_head"])
    assert data.skip_bad_rows is True
    assert json.loads(data.chat_template_kwargs) == {"thinking": False}


def test_a_flag_wins_over_the_file_in_either_spelling(settings):
    _, data, config = settings(
        "beta: 0.1\nmax_length: null", "--beta", "1e-2", "--max-length", "64", "--skip-bad-rows", "--alpha=0.5"
    )
    assert (config.beta, config.max_length, config.alpha, data.skip_bad_rows) == (0.01, 64, 0.5, True)


def test_what_the_file_leaves_out_has_the_papers_value(settings):
    config = settings("")[2]
    assert (config.learning_rate, config.beta, config.alpha, config.max_length) == (3e-7, 0.01, 0.1, 2048)


MISTAKES = {
    "unknown field": (
        "lerning_rate: 1",
        [],
        r"config.yaml: .* 'lerning_rate'; did you mean 'learning_rate'\?",
    ),
    "unknown flag": ("", ["--bta", "1"], r"no setting named 'bta'; did you mean 'beta'\?"),
    "unknown flag like no other": ("", ["--qqqq"], "no setting named 'qqqq'; --help lists them"),
    "a stray word": ("", ["words"], "expected --field value, got 'words'"),
    "a flag of one letter": ("", ["-x"], "no setting named 'x'; --help lists them"),
    "a flag without its value": ("", ["--beta"], "^beta: expected a value, got none$"),
    "a list without a value": ("", ["--lora-target-modules"], "^lora_target_modules: expected a value, got none$"),
    "text for a number in a flag": ("", ["--beta", "much"], "^beta: expected a number, got 'much'"),
    "text for a whole number": ("", ["--seed", "1.5"], "^seed: expected a whole number, got '1.5'"),
    "text for true or false": ("", ["--length_normalize=maybe"], "expected true or false, got 'maybe'"),
    "a choice that is none in a flag": ("", ["--torch-dtype", "int8"], "^torch_dtype: expected one of float32, .* got"),
    "a mapping that JSON cannot hold": ("lr_scheduler_kwargs: {a: 2024-01-01}", [], "put dates in quotes"),
    "two settings files": (
        "",
        ["--config", "b.yaml"],
        "config: expected one settings file, got b.yaml and ",
    ),
    "data from two places": (
        "dataset_name: d",
        [],
        "expected one of the two, got 't.jsonl' and 'd'",
    ),
    "evaluation rows from two places": (
        "dataset_test_split: test\neval_file: e.jsonl",
        [],
        "^dataset_test_split, eval_file: expected one of the two, got 'test' and 'e.jsonl'",
    ),
    "a split of nothing": ("dataset_test_split: test", [], "dataset_test_split needs dataset_name"),
    "a configuration of nothing": ("dataset_config: c", [], "dataset_config needs dataset_name"),
    "a template that is not in a file": ("chat_template: chatml", [], "chat_template: expected none, got 'chatml'"),
    "two templates": (
        "chat_template: none\nchat_template_file: f",
        [],
        "beside chat_template_file 'f'; keep one",
    ),
    "template options that are no mapping": (
        "chat_template_kwargs: 3",
        [],
        "^chat_template_kwargs: expected a mapping",
    ),
    "template options that are no JSON": ("chat_template_kwargs: '{'", [], "^chat_template_kwargs: .* not JSON"),
    "template options too deep": (f"chat_template_kwargs: '{'[' * 100_000}'", [], "^chat_template_kwargs: .* not JSON"),
    "text for a number": ("beta: much", [], "config.yaml: beta: expected a number, got 'much'"),
    "a choice that is none": (
        "torch_dtype: int8",
        [],
        "config.yaml: torch_dtype: expected one of .*, got 'int8'",
    ),
    "null where a value must be": ("alpha: null", [], "config.yaml: alpha: expected a value, got null"),
    "a value out of range": ("alpha: 1.5", [], "^alpha: expected a finite number >= 0 and <= 1, got 1.5"),
    "not YAML": ("beta: [", [], r"config.yaml: not a YAML file \(line 5\)"),
    "a month 13": ("run_name: 2026-13-01", [], "config.yaml: holds a number, date or tag"),
    "a number of 5000 digits": ("beta: " + "1" * 5000, [], "config.yaml: holds a number, date or tag"),
    "brackets in brackets": ("beta: " + "[" * 3000, [], "config.yaml: holds brackets in brackets"),
    "a field twice": ("beta: 1\nbeta: 2", [], "config.yaml: beta stands in line 5 and in line 6; keep one"),
    "a list for one value": ("seed: [1, 2]", [], "config.yaml: seed: expected one value, got 2 in a list"),
    "modules to adapt without a rank": ("lora_target_modules: [q_proj]", [], "lora_target_modules needs lora_r"),
    "a negative rank": ("lora_r: -1", [], "lora_r: expected a whole number >= 0, got -1"),
    "an endless scale": ("lora_alpha: inf", [], "lora_alpha: expected a finite number > 0, got inf"),
    "no scale": ("lora_alpha: 0", [], "lora_alpha: expected a finite number > 0, got 0"),
    "dropout of everything": ("lora_dropout: 1", [], "lora_dropout: expected a finite number >= 0 and < 1, got 1"),
}


@pytest.mark.parametrize(("lines", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_settings_is_named(settings, lines, flags, words):
    with pytest.raises(SettingsError, match=words):
        settings(lines, *flags)


OUT_OF_RANGE = {
    "learning_rate": ("inf", "-1", "nan"),
    "weight_decay": ("-1", "nan"),
    "max_grad_norm": ("-1", "nan"),
    "warmup_steps": ("-1", "nan"),
    "num_train_epochs": ("-1", "inf"),
    "per_device_train_batch_size": ("0",),
    "per_device_eval_batch_size": ("0",),
    "gradient_accumulation_steps": ("0",),
    "dataloader_num_workers": ("-1",),
    "seed": ("-1", "1" + "0" * 20, "1" + "0" * 400),
    "data_seed": ("-1",),
}


@pytest.mark.parametrize("config_class", [WRPOConfig, SFTConfig])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_number_that_no_run_could_use_is_named(settings, name, value, config_class):
    with pytest.raises(SettingsError, match=f"^{name}: expected a (finite|whole) number >= [01]"):
        settings("", f"--{name}", value, config_class=config_class)


def test_lora_without_its_package_is_named_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"lora_r needs the package peft: pip install 'wrpo\[peft\]'"):
        settings("lora_r: 8")


@pytest.mark.parametrize(("text", "got"), [("- beta", "list"), ("", "an empty file"), (None, "a folder")])
def test_a_file_without_fields_is_refused(text, got, tmp_path):
    path = tmp_path / "config.yaml"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(SettingsError, match=rf"config\.yaml: expected .*, got {got}"):
        parse_settings((WRPOConfig,), [str(path)], "wrpo train")


def test_no_data_at_all_is_one_sentence(tmp_path):
    with pytest.raises(SettingsError, match="train_file, dataset_name: expected one of the two, got neither"):
        parse_settings((DataSettings,), [], "wrpo train")


def test_a_required_field_that_is_missing_is_named():
    with pytest.raises(
        SettingsError, match=r"^model_name_or_path: expected a value, got none\. Give it as --model_name"
    ):
        parse_settings((ModelSettings,), [], "wrpo train")


def test_a_mistyped_flag_is_named_before_the_required_one_it_leaves_open():
    with pytest.raises(SettingsError, match="did you mean 'train_file'"):
        parse_settings((ModelSettings, DataSettings), ["--train_fil", "x"], "wrpo train")


# -- every command ----------------------------------------------------------------------------------------------------

# The same settings as words and flags, in any spelling, and as a file.
COMMANDS = {
    "sample": (
        wrpo.sampling.command.parse,
        ["s.yaml", "a.jsonl", "b.jsonl", "-o", "o.jsonl", "--max-tokens", "7", "--keep", "x", "y", "--skip-bad-rows"],
        "sources: s.yaml\nprompts: [a.jsonl, b.jsonl]\noutput: o.jsonl\nmax_tokens: 7\nkeep: [x, y]\nskip_bad_rows: y",
    ),
    "score": (
        wrpo.scoring.command.parse,
        ["--reward-model", "m", "--skip_bad_rows", "a.jsonl", "--batch_size=2", "-o", "o.jsonl"],
        "reward_model: m\nskip_bad_rows: true\ncandidates: a.jsonl\nbatch_size: 2\noutput: o.jsonl",
    ),
    "build": (
        wrpo.building.command.parse,
        ["a.jsonl", "b.jsonl", "-o", "out", "--sft-share", "0", "--num_sources", "2", "--overwrite"],
        "candidates: [a.jsonl, b.jsonl]\noutput_dir: out\nsft_share: 0\nnum_sources: 2\noverwrite: true",
    ),
    "logp": (
        wrpo.reference.command.parse,
        ["t.jsonl", "-o", "o.jsonl", "--models", "a", "b", "--max-length", "none"],
        "triples: t.jsonl\noutput: o.jsonl\nmodels: [a, b]\nmax_length: null",
    ),
    "eval": (
        wrpo.evaluation.command.parse,
        ["a.jsonl", "-o", "out", "--group-by", "skill", "--verifier", "m:f", "--export", "arena-hard"],
        "answers: [a.jsonl]\noutput: out\ngroup_by: skill\nverifier: m:f\nexport: arena-hard",
    ),
    "train": (
        lambda arguments: wrpo.training.command.parse("train", WRPOConfig, [*arguments, "--use_cpu"]),
        ["t.jsonl", "--model-name_or-path", "m", "--output-dir", "{}", "--no-draw-curves", "--beta=1", "--from-scores"],
        "train_file: t.jsonl\nmodel_name_or_path: m\noutput_dir: {}\ndraw_curves: no\nbeta: 1\nfrom_scores: on",
    ),
    "sft": (
        lambda arguments: wrpo.training.command.parse("sft", SFTConfig, [*arguments, "--use_cpu"]),
        ["--dataset-name", "d", "--dataset_split", "s", "--model_name_or_path", "m", "--output_dir", "{}"],
        "dataset_name: d\ndataset_split: s\nmodel_name_or_path: m\noutput_dir: {}",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_same_settings_as_flags_and_from_a_file(command, tmp_path):
    parse, arguments, lines = COMMANDS[command]
    arguments = [argument.format(tmp_path) for argument in arguments]
    path = tmp_path / "settings.yaml"
    path.write_text(lines.format(tmp_path))
    given = values(parse(arguments))
    assert values(parse(["--config", str(path)])) == given
    if command != "sample":
        assert values(parse([str(path)])) == given


def values(parsed) -> list[dict]:
    parts = parsed if isinstance(parsed, tuple) else (parsed,)
    return [
        {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init} for part in parts
    ]


def test_the_first_word_of_wrpo_sample_is_its_sources_even_beside_a_settings_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("output: o.jsonl\nsources: other.yaml\nsamples: 2")
    config = ["--config", str(tmp_path / "settings.yaml")]
    settings, drawn = wrpo.sampling.command.parse(["s.yaml", *config, "p.jsonl"])
    assert (settings.sources, settings.prompts, settings.output, drawn.samples) == ("s.yaml", ["p.jsonl"], "o.jsonl", 2)


@pytest.mark.parametrize(("flags", "is_set"), [([], True), (["false"], False), (["no"], False), (["true"], True)])
def test_the_value_of_a_bool_may_be_left_out_before_a_word(flags, is_set):
    arguments = ["-o", "o.jsonl", "--verifier", "m:f", "--skip-bad-rows", *flags, "a.jsonl"]
    settings, *_ = wrpo.scoring.command.parse(arguments)
    assert (settings.skip_bad_rows, settings.candidates) == (is_set, ["a.jsonl"])


@pytest.mark.parametrize(
    "words",
    [
        ["--loss_type", "sigmoid", "sft"],
        ["--loss_type", "sigmoid,sft"],
        ["--loss-type", "sigmoid,", "sft"],
        ["--loss_type=sigmoid", "sft"],
        ["--loss_type", "sigmoid", "sft", "t.jsonl"],
    ],
    ids=" ".join,
)
def test_several_losses_stand_behind_their_flag(words, tmp_path):
    arguments = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu", "--loss_weights", "1", "0.5"]
    files = [] if "t.jsonl" in words else ["--train_file", "t.jsonl"]
    _, data, training = wrpo.training.command.parse("dpo", WRPOConfig, [*arguments, *files, *words])
    assert (training.loss_type, training.loss_weights, data.train_file) == (["sigmoid", "sft"], [1.0, 0.5], "t.jsonl")


@pytest.mark.parametrize("flag", ["--loss_type sigmoid", "--loss_type=sigmoid,sft"])
def test_a_word_behind_losses_that_is_neither_one_nor_a_file_is_named(settings, flag):
    with pytest.raises(SettingsError, match=r"^loss_type: expected one of sigmoid, .*, got 'stf', which is no file"):
        settings("", *flag.split(), "stf")


def test_one_loss_behind_its_flag_is_its_name(settings):
    (*_, training), (*_, in_a_file) = settings("", "--loss_type", "ipo"), settings("loss_type: ['ipo,sft']")
    assert (training.loss_type, in_a_file.loss_type) == ("ipo", ["ipo", "sft"])


def test_a_word_and_a_flag_for_one_field_are_refused():
    with pytest.raises(SettingsError, match="candidates: given as --candidates, and again as the word 'b'; keep one"):
        wrpo.scoring.command.parse(["b", "--candidates", "a", "-o", "o.jsonl", "--verifier", "m:f"])


def test_words_beyond_the_fields_are_refused():
    with pytest.raises(SettingsError, match=r"expected --field value, got 'u\.jsonl'"):
        wrpo.training.command.parse("train", WRPOConfig, ["t.jsonl", "u.jsonl", "--model_name_or_path", "m"])


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "sft", "build", "info"])
def test_help_says_what_the_command_does(command, capsys):
    with suppress(SystemExit):
        assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    does = {"train": "Preference optimisation", "sft": "Fine-tuning on the source answers", "build": "training data"}
    assert does.get(command, "Versions") in shown
    if command != "info":
        assert f"    wrpo {command} " in shown  # an example to copy


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


GROUPS_SHOWN = {
    "train": "files model data training loss reference speed logging",
    "sft": "files model data training speed logging",
    "sample": "files asking choice",
    "score": "files scorer reward_model choice",
    "build": "files choice limits",
    "logp": "files model data speed",
    "eval": "files model asking scorer comparison triples",
}


@pytest.mark.parametrize("command", GROUPS_SHOWN)
def test_help_is_in_groups_and_shows_each_flag_in_one_spelling(command, capsys):
    shown = help_of(command, capsys)
    groups = [title.replace(" ", "_") for title in re.findall(r"^([a-z ]+):$", shown, re.MULTILINE)]
    assert [group for group in groups if group != "options"] == GROUPS_SHOWN[command].split()
    assert not re.search(r"^  --\w+-\w", shown, re.MULTILINE)
    assert "--config FILE.yaml" in shown


def test_help_lists_every_field_of_every_kind_of_source_and_of_a_judge(capsys):
    for command, names in (
        ("sample", ("requests_per_minute", "attn_implementation", "engine", "top_p")),
        ("score", ("pattern", "api_key_env", "--verifier")),
    ):
        shown = help_of(command, capsys)
        assert all(name in shown for name in names)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_shows_the_commands_own_fields_first_and_a_default_once(command, capsys):
    own, inherited = " ".join(help_of(command, capsys).split()).split("fields of transformers.TrainingArguments:")
    for flag in ("--train_file ", "--lora_r ", "--budget_bytes ", "--max_length ", "--no_draw_curves "):
        assert flag in own
    assert "--weight_decay " in inherited and "--weight_decay" not in own
    assert not re.search(r"Default: [^.]*\. Default:", own)
    assert "Default: linear (paper)." in own or command == "sft"
    assert "--lora_r LORA_R Rank of LoRA adapters; 0: train all weights. Default: 0." in own
    assert "--no_draw_curves The same as --draw_curves false." in own


def test_a_field_names_a_group_that_help_shows():
    with pytest.raises(ValueError, match="expected one of files, model, data"):
        knob(1, "Something.", group="various")


@dataclasses.dataclass
class Ranged:
    share: float = 0.5
    limit: int | None = None


@pytest.mark.parametrize(
    ("name", "value", "ends", "words"),
    [
        (
            "share",
            1.0,
            {"low": 0, "high": 1, "open_high": True},
            "share: expected a finite number >= 0 and < 1, got 1.0",
        ),
        ("share", 0, {"low": 0.0, "open_low": True}, "share: expected a finite number > 0, got 0"),
        ("share", math.nan, {}, "share: expected a finite number, got nan"),
        ("share", -math.inf, {"high": 1}, "share: expected a finite number <= 1, got -inf"),
        ("share", 10**400, {}, "share: expected a finite number, got 1000"),
        ("share", None, {}, "share: expected a finite number, got None"),
        ("share", "1", {}, "share: expected a finite number, got '1'"),
        ("share", True, {}, "share: expected a finite number, got True"),
        ("limit", 0, {"low": 1}, "limit: expected a whole number >= 1, got 0"),
        ("limit", 10.5, {"low": 1}, "limit: expected a whole number >= 1, got 10.5"),
        ("limit", 10.0, {"low": 1}, "limit: expected a whole number >= 1, got 10.0"),
        ("limit", math.inf, {}, "limit: expected a whole number, got inf"),
        ("limit", False, {"low": 0}, "limit: expected a whole number >= 0, got False"),
    ],
)
def test_a_number_out_of_range_is_named_with_the_range(name, value, ends, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        check_range(Ranged(**{name: value}), name, **ends)


def test_the_ends_of_a_range_belong_to_it_and_none_passes_where_a_field_may_be_none():
    for value in (0, 1):
        check_range(Ranged(share=value), "share", "limit", low=0, high=1)
