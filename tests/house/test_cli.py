"""The command line: settings mean what they say, mistakes are one line, and both stages run from a file of settings."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import yaml
from tiny_tokenizer import tiny_tokenizer

from wrpo import SFTConfig, WRPOConfig, cli
from wrpo.data import load_triples
from wrpo.pretrained import load_model, load_tokenizer, warn_of_coarse_weights
from wrpo.settings import DataSettings, ModelSettings, SettingsError, parse_settings
from wrpo.user_error import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
TRIPLES = str(EXAMPLES / "triples_explicit.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def settings(tmp_path):
    """Settings from the lines of a YAML file and from flags, in a folder of their own."""

    def parse(lines: str, *flags: str, config_class: type = WRPOConfig):
        path = tmp_path / "config.yaml"
        path.write_text(f"model_name_or_path: m\ntrain_file: t.jsonl\noutput_dir: {tmp_path}\nuse_cpu: true\n{lines}")
        return parse_settings((ModelSettings, DataSettings, config_class), [str(path), *flags], "wrpo train")

    return parse


# -- settings ---------------------------------------------------------------------------------------------------------

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
    "text for a number": ("beta: much", [], "argument --beta: invalid float value: 'much'"),
    "a choice that is none": ("torch_dtype: int8", [], "argument --torch_dtype: invalid choice: 'int8'"),
    "null where a value must be": ("beta: null", [], "config.yaml: beta: expected a value, got null"),
    "a value out of range": ("alpha: 1.5", [], "alpha must be .* <= 1, got 1.5"),
    "not YAML": ("beta: [", [], "config.yaml: not a YAML file"),
    "a month 13": ("run_name: 2026-13-01", [], "config.yaml: not a YAML file: month must be in 1..12"),
    "a number of 5000 digits": ("beta: " + "1" * 5000, [], "config.yaml: not a YAML file"),
    "brackets in brackets": ("beta: " + "[" * 3000, [], "config.yaml: not a YAML file"),
    "a field twice": ("beta: 1\nbeta: 2", [], "config.yaml: beta stands in line 5 and in line 6; keep one"),
    "a list for one value": ("seed: [1, 2]", [], "config.yaml: seed: expected one value, got 2 in a list"),
    "modules to adapt without a rank": ("lora_target_modules: [q_proj]", [], "lora_target_modules needs lora_r"),
    "a negative rank": ("lora_r: -1", [], "lora_r must be a rank of at least 1, or 0 .*, got -1"),
    "an endless scale": ("lora_alpha: inf", [], "lora_alpha must be a finite number > 0, got inf"),
    "no scale": ("lora_alpha: 0", [], "lora_alpha must be a finite number > 0, got 0"),
    "dropout of everything": ("lora_dropout: 1", [], r"lora_dropout must be in \[0, 1\), got 1"),
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
    with pytest.raises(SettingsError, match=f"^{name} must be a finite number >= [01]"):
        settings("", f"--{name}", value, config_class=config_class)


def test_lora_without_its_package_is_named_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"lora_r needs the package peft: pip install 'wrpo\[peft\]'"):
        settings("lora_r: 8")


def test_a_file_without_fields_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- beta")
    with pytest.raises(SettingsError, match=r"config\.yaml: expected 'field: value' lines, got list"):
        parse_settings((WRPOConfig,), [str(tmp_path / "config.yaml")], "wrpo train")


def test_a_folder_of_settings_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="expected a YAML file, got a folder"):
        parse_settings((WRPOConfig,), [str(tmp_path)], "wrpo train")


def test_a_mistyped_flag_is_named_before_the_required_one_it_leaves_open():
    with pytest.raises(SettingsError, match="did you mean 'train_file'"):
        parse_settings((ModelSettings, DataSettings), ["--train_fil", "x"], "wrpo train")


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


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_shows_the_commands_own_fields_first_and_a_default_once(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    own, inherited = " ".join(capsys.readouterr().out.split()).split("fields of transformers.TrainingArguments:")
    for flag in ("--train_file ", "--lora_r ", "--budget_bytes ", "--max_length ", "--no_draw_curves "):
        assert flag in own
    assert "--weight_decay " in inherited and "--weight_decay" not in own
    assert not re.search(r"Default: [^.]*\. \(default:", own)
    assert "--max-length" not in own
    assert "--no_draw_curves The same as --draw_curves false." in own


# -- exit status ------------------------------------------------------------------------------------------------------


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": "a"}\n')
    mistakes = [
        ["trian"],
        ["train", "--bta", "1"],
        ["sft", str(tmp_path / "nowhere.yaml")],
        ["build", str(tmp_path / "bad.jsonl"), "-o", str(tmp_path / "out")],
        ["info", "please"],
    ]
    for arguments in mistakes:
        assert cli.main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("wrpo")
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments: list[str]) -> None:
        raise ValueError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "info", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["info"])


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied", "out"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
)
def test_an_output_that_cannot_be_written_is_one_line_and_status_2(error, monkeypatch, capsys):
    def full(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", full)
    assert cli.main(["info"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("wrpo info: cannot be read or written: ")
    assert shown.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is one of Linux")
def test_a_full_stdout_is_one_line_and_status_2():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "wrpo", "--help"]
        shown = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr == "wrpo: cannot be read or written: [Errno 28] No space left on device\n"


def test_what_the_terminal_cannot_show_is_escaped():
    code = "from wrpo import cli; cli.COMMANDS['info'] = lambda _: print('\u00e9'); cli.main(['info'])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout == "\\xe9\n"


def test_a_rank_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err.startswith("wrpo info: RANK: expected a whole number, got 'x'")


def test_a_missing_package_of_the_train_extra_says_what_to_install(monkeypatch, capsys):
    def broken(arguments: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setitem(cli.COMMANDS, "info", broken)
    assert cli.main(["info"]) == 2
    assert "pip install 'wrpo[train]'" in capsys.readouterr().err


def test_help_and_mistyped_commands_load_nothing_heavy():
    code = "import sys; from wrpo.cli import main; main(['-h']); main(['trian']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "wrpo train CONFIG.yaml" in shown.stdout
    assert "did you mean 'train'?" in shown.stderr
    assert shown.stdout.splitlines()[-1] == "False"


def test_what_only_reads_and_chooses_rows_waits_for_no_torch(tmp_path):
    """Which takes seconds to load: `sample` and `score` ask other programs, `build` and `eval` count."""
    rows = [("s", 0, 0.9), ("target", 0, 0.5), ("target", 1, 0.1)]
    answers = [
        {"prompt_id": "a", "prompt": "p", "model": model, "sample": sample, "response": f"{reward}", "reward": reward}
        for model, sample, reward in rows
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    (tmp_path / "rewards.py").write_text("def one(prompt, response):\n    return 1.0\n")
    (tmp_path / "sources.yaml").write_text(
        "- {model: m, kind: server, base_url: 'http://127.0.0.1:9/v1', retries: 0}\n"
    )
    code = (
        "import sys; from wrpo.cli import main\n"
        "print([main(command.split()) for command in (\n"
        "    'build answers.jsonl -o built --sft-share 0',\n"
        "    'eval answers.jsonl -o evaluated --solved-at 0.5',\n"
        "    'score answers.jsonl -o scored.jsonl --verifier rewards:one',\n"
        "    'sample sources.yaml answers.jsonl -o sampled.jsonl')])\n"
        "print([name for name in ('torch', 'datasets') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-2:] == ["[0, 0, 0, 3]", "[]"], shown.stderr


def test_the_module_passes_its_status_on():
    shown = subprocess.run(
        [sys.executable, "-m", "wrpo", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "wrpo: no command 'trian'; did you mean 'train'?\n"


def test_info_is_the_report_of_the_kernels(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch " in shown
    assert "token_logp" in shown


# -- commands ---------------------------------------------------------------------------------------------------------


def test_the_examples_hold_the_same_triples_in_both_forms():
    explicit, released = (
        load_triples(EXAMPLES / f"triples_{form}.jsonl").remove_columns(["file", "row"])[:]
        for form in ("explicit", "released")
    )
    assert explicit == released


@pytest.mark.parametrize(("name", "config_class"), [("wrpo.yaml", WRPOConfig), ("sft.yaml", SFTConfig)])
def test_every_field_of_the_example_settings_arrives(name, config_class, monkeypatch, tmp_path):
    written = yaml.safe_load((EXAMPLES / name).read_text())
    flags = ["--use_cpu", "--output_dir", str(tmp_path)]
    parts = parse_settings((ModelSettings, DataSettings, config_class), [str(EXAMPLES / name), *flags], "wrpo")
    values = {key: value for part in parts for key, value in vars(part).items()}
    for key in written.keys() - {"output_dir"}:
        expected = [] if written[key] == "none" else written[key]  # what TrainingArguments makes of report_to: none
        assert values[key] == (float(expected) if isinstance(values[key], float) else expected)


@pytest.fixture
def tiny_model(tmp_path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("sft", []),
        ("train", ["--eval_file", str(EXAMPLES / "triples_released.jsonl")]),
        ("train", ["--lora_r", "2", "--lora_target_modules", "q_proj", "lm_head"]),
    ],
    ids=["sft", "train", "train with LoRA"],
)
def test_a_stage_trains_from_an_example_and_says_where_everything_is(command, flags, tiny_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = EXAMPLES / ("sft.yaml" if command == "sft" else "wrpo.yaml")
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out)]
    assert cli.main([command, str(config), *here, "--use_cpu", "--save_strategy", "no", *flags]) == 0
    assert f"model    {out}\n" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics
    assert ("eval_loss" in json.dumps(metrics)) == ("--eval_file" in flags)
    assert AutoTokenizer.from_pretrained(out).chat_template
    if not flags:
        AutoModelForCausalLM.from_pretrained(out)


def test_a_stage_says_how_many_rows_it_takes_from_which_file(tiny_model, tmp_path, monkeypatch, caplog):
    """So that nobody takes the eight rows of the example for data of their own."""
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("wrpo"), "handlers", [logging.NullHandler()])  # else main adds its own
    config, released = str(EXAMPLES / "sft.yaml"), str(EXAMPLES / "triples_released.jsonl")
    here = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert cli.main(["sft", config, *here, "--train_file", released, "--eval_file", TRIPLES]) == 0
    loaded = [record.getMessage() for record in caplog.records if "rows loaded" in record.getMessage()]
    assert loaded == [f"{path}: 8 rows loaded, no bad rows" for path in (released, TRIPLES)]


def test_reports_are_those_of_the_first_process_alone(monkeypatch):
    logger = logging.getLogger("wrpo")
    for rank, is_said in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["info"]) == 0
        assert logger.isEnabledFor(logging.INFO) is is_said


def test_a_run_that_ends_in_nan_fails_and_saves_nothing(tiny_model, tmp_path, capsys):
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(tmp_path / "out")]
    rates = ["--optim", "sgd", "--learning_rate", "1e38", "--max_grad_norm", "0", "--lr_scheduler_type", "constant"]
    command = ["sft", *here, *rates, "--warmup_steps", "0", "--use_cpu", "--save_strategy", "no", "--max_steps", "2"]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("wrpo sft: training ended in NaN or infinity")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_run_resumes_from_its_newest_checkpoint(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out), "--use_cpu"]
    command = ["sft", str(EXAMPLES / "sft.yaml"), *here, "--logging_steps", "1", "--save_strategy", "steps"]
    command += ["--save_steps", "1"]
    assert cli.main([*command, "--resume_from_checkpoint", "true"]) == 2
    assert f"no checkpoint in {out}" in capsys.readouterr().err
    assert cli.main([*command, "--max_steps", "1"]) == 0
    assert cli.main([*command, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    log = json.loads((out / "metrics.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line] == [1, 2], "the first line is the first run's"


def test_a_checkpoint_that_is_damaged_is_named_as_the_thing_to_drop(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out), "--use_cpu"]
    command = ["sft", *here, "--save_steps", "1"]
    assert cli.main([*command, "--max_steps", "1"]) == 0
    (out / "checkpoint-1" / "optimizer.pt").write_bytes(b"no tensors")
    assert cli.main([*command, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"wrpo sft: resume_from_checkpoint: {out}/checkpoint-1 is damaged")
    assert "Drop it" in last


@pytest.mark.parametrize("content", [b"\xff", None], ids=["not UTF-8", "a folder"])
def test_a_chat_template_that_is_no_text_is_named(content, tiny_model, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(content) if content else path.mkdir()
    with pytest.raises(SettingsError, match=r"chat_template_file: .*template\.jinja"):
        load_tokenizer(ModelSettings(str(tiny_model), chat_template_file=str(path)))


def test_only_training_speaks_of_coarse_weights(tiny_model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    model = load_model(ModelSettings(str(tiny_model), torch_dtype="bfloat16"))
    assert "wants torch_dtype" not in caplog.text
    warn_of_coarse_weights(model)
    assert "wants torch_dtype: float32" in caplog.text


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "3"])
def test_template_options_that_are_no_mapping_are_named(text):
    with pytest.raises(UserError, match=r"^chat_template_kwargs: "):
        cli._template_options(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernel_backend", "nativ"], "kernel_backend='nativ': "),
        (["--reference", "adapter"], "reference='adapter' needs a PEFT model"),
        (["--lora_r", "2", "--lora_target_modules", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_do_not_go_with_the_model_are_one_line(flags, words, tiny_model, tmp_path, capsys):
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(["train", *here, "--use_cpu", "--disable_tqdm", "true", *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wrpo train: ")
    assert words in last


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    command = ["train", "--model_name_or_path", str(tmp_path / "nothing"), "--train_file", TRIPLES]
    assert cli.main([*command, "--use_cpu", "--output_dir", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"wrpo train: model_name_or_path '{tmp_path / 'nothing'}': ")
    assert shown.count("\n") == 1
