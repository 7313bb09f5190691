"""What the pages show is true: their Python runs, their links lead somewhere, the generated ones are up to date."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import preference_batch, tiny_model, tiny_rows
from tiny_tokenizer import tiny_tokenizer

from wrpo import DPOConfig
from wrpo.cli import COMMANDS, main
from wrpo.training.loss_names import RECIPES, LossName
from wrpo_kernels.preference_loss.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [path for folder in (".", "docs", "benchmarks", "csrc", "examples/*") for path in ROOT.glob(f"{folder}/*.md")]
# The pages with Python.
IN_DOCS = ("own_loop", "coming_from", "coming_from_trl", "layouts", "losses")
RUNNING = ("README.md", *(f"docs/{name}.md" for name in IN_DOCS))
PAIRS = [{"prompt": f"What is 2 + {n}?", "chosen": f"It is {n + 2}.", "rejected": "hello world"} for n in range(4)]


def blocks(page: Path, language: str) -> list[str]:
    """Those of a page in order, without those under a comment `<!-- not run: reason -->`."""
    block = rf"(<!-- not run: [^>]+-->\n)?^```{language}\n(.*?)^```"
    shown = re.findall(block, page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for skipped, code in shown if not skipped]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch) -> dict[str, Any]:
    """What a reader has: a model and pairs in the working folder, and the names of a batch of pairs in a loop."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("path/to/model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained("path/to/model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    batch = preference_batch(tiny_rows(2, sources=0))
    order = [0, 2, 1, 3]  # the chosen answers, then the rejected ones
    names = {name: batch[name][order] for name in ("input_ids", "attention_mask", "labels")}
    return {**names, "ref_logp": torch.full((4,), -30.0)}


@pytest.mark.parametrize("page", RUNNING)
def test_the_python_of_a_page_runs_as_written(page, reader):
    shown = blocks(ROOT / page, "python")
    assert shown
    for code in shown:  # in order and in one namespace, as a reader would paste them
        exec(compile(code, page, "exec", dont_inherit=True), reader)


def test_every_loss_of_the_kernels_and_of_the_trainer_stands_in_the_table_of_losses():
    page = (ROOT / "docs/losses.md").read_text().split("## ")[0]
    named = set(re.findall(r"`(\w+)`", page))
    assert named >= {*CATALOGUE, *get_args(LossName)}
    assert {*get_args(LossName)} == {*CATALOGUE, *RECIPES}


def test_no_other_page_shows_python():
    generated = ("docs/api.md",)  # signatures
    assert {relative(page) for page in PAGES if blocks(page, "python")} - {*generated} == {*RUNNING}


def test_the_readme_trains_and_saves_a_model(reader):
    trains, in_a_loop = blocks(ROOT / "README.md", "python")
    exec(trains, reader)
    assert {"model.safetensors", "tokenizer.json", "metrics.json"} <= {path.name for path in Path("runs/dpo").iterdir()}
    exec(in_a_loop, reader)
    gradients = [parameter.grad for parameter in reader["model"].parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.usefixtures("reader")
def test_the_readmes_command_for_pairs_runs_as_written(capsys):
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    (line,) = (line for line in lines if line.startswith("wrpo dpo"))
    assert main(shlex.split(line, comments=True)[1:]) == 0
    assert "model    runs/dpo" in capsys.readouterr().out.splitlines()


def test_ci_runs_the_commands_that_the_readme_names():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    for command in ("make test", "make lint"):
        assert re.search(rf"^{command}$", ci, re.MULTILINE), f".ci/run does not run `{command}`"
    assert "make test" in readme
    assert "make demo" in readme


def test_the_readme_installs_the_checkout_in_place():
    # A copy in site-packages hides behind the sources when Python starts in the checkout, native module and all.
    installs = re.findall(r"pip install ([^&\n]*)[\"']\.", (ROOT / "README.md").read_text())
    assert installs, "README.md shows no `pip install` of the checkout"
    assert all("-e" in options.split() for options in installs)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert heading in anchors, target


def test_the_index_names_every_page_of_the_documentation():
    index = (ROOT / "docs/README.md").read_text()
    named = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in named if f"({name})" not in index} == set()


@pytest.fixture(scope="module")
def generate() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/generate.py"))


@pytest.mark.parametrize("name", ["api.md", "settings.md"])
def test_a_generated_page_is_what_the_code_says_now(name, generate):
    assert (ROOT / "docs" / name).read_text() == generate["PAGES"][name](), "run `make docs`"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_the_page_of_settings_has_every_flag_that_the_help_of_a_command_has(command, generate, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    own, _, _ = capsys.readouterr().out.partition("other fields of transformers.TrainingArguments")
    entries = re.findall(r"^  (-\S+(?: \S+)*)", own, re.MULTILINE)  # up to the two blanks before the help
    flags = {flag.replace("-", "_") for entry in entries for flag in re.findall(r"--([\w-]+)", entry)}
    settings = generate["command_settings"](generate["COMMANDS"][command])
    aliases = [flag for setting in settings.values() for flag in setting.field.metadata.get("aliases", ())]
    documented = {*settings, *(flag[2:] for flag in aliases if flag.startswith("--"))}
    assert flags - {"config", "help"} <= documented | {f"no_{name}" for name in documented}
    assert documented <= flags


def test_the_defaults_beside_trls_are_ours(tmp_path):
    page = (ROOT / "docs/coming_from_trl.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (\S+) \|$", page.split("## Defaults side by side")[1], re.MULTILINE)
    assert len(rows) > 8
    config = DPOConfig(output_dir=str(tmp_path))
    for name, shown in rows:
        value = getattr(config, name)
        assert shown == (
            f"{value:g}".replace("e-0", "e-") if type(value) in (int, float) else str(getattr(value, "value", value))
        ), name
