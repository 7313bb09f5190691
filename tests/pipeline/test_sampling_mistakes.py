"""A mistake in the files or flags of `wrpo sample` is one line, before anything is asked."""

from __future__ import annotations

import sys

import pytest
from sampled import FINE

from wrpo import cli

pytest_plugins = ("sampling_fixtures",)  # its fixtures


MISTAKES = {
    "a misspelt field": (
        [{**FINE, "concurency": 4}],
        ["p"],
        [],
        "entry 1: no setting named 'concurency'; did you mean",
    ),
    "text for a number": ([{**FINE, "timeout": "long"}], ["p"], [], "entry 1: timeout: expected a number"),
    "out of range": ([{**FINE, "top_p": 0}], ["p"], [], "entry 1: top_p: expected a finite number > 0 and <= 1, got 0"),
    "no model": ([{"base_url": "http://x/v1"}], ["p"], [], "entry 1: model: expected a value, got none"),
    "no kind": ([{**FINE, "kind": None}], ["p"], [], "kind: expected one of server, transformers, vllm, got None"),
    "no address": ([{"model": "a"}], ["p"], [], "base_url: expected an address such as"),
    "no scheme": ([{**FINE, "base_url": "localhost:8000"}], ["p"], [], "base_url: expected an address such as"),
    **{
        f"an address {url!r}": ([{**FINE, "base_url": url}], ["p"], [], "base_url: expected an address such as")
        for url in ("http://x:99999/v1", "http://x:abc/v1", "http://x/\nv1", "http://[::1", "http://a..b/v1")
    },
    "a list of kinds": (
        [{**FINE, "kind": ["a"]}],
        ["p"],
        [],
        "entry 1: kind: expected one of server, transformers, vllm",
    ),
    "one name twice": ([FINE, FINE], ["p"], [], "two models are named 'a'"),
    "no sources": ([], ["p"], [], "expected a list of models"),
    "a field that is not open": ([{**FINE, "extra_body": {"n": 2}}], ["p"], [], "extra_body: 'n' is set elsewhere"),
    "a misspelt flag": ([FINE], ["p"], ["--sampels", "2"], "no setting named 'sampels'; did you mean 'samples'?"),
    "no answers": ([FINE], ["p"], ["--samples", "0"], "samples: expected a whole number >= 1, got 0"),
    "a wrong shard": ([FINE], ["p"], ["--shard", "3/3"], "shard: expected i/n with i from 0 to n - 1"),
    "a model that is none": ([FINE], ["p"], ["--model", "b"], "model: expected one of a in"),
    "a field that is none": (
        [FINE],
        ["p"],
        ["--keep", "skill"],
        "row 1, field 'skill': expected the field that --keep",
    ),
    "a field of the answers to keep": (
        [FINE],
        ["p"],
        ["--keep", "seed"],
        "keep: expected a field of the prompts, got 'seed'",
    ),
    "no prompts": ([FINE], [], [], "expected at least one prompt"),
    "an empty prompt": ([FINE], ["p", {"prompt": " "}], [], "prompts.jsonl, row 2, field 'prompt': expected text"),
    "no prompt": ([FINE], [{"text": "p"}], [], "row 1, field 'prompt': expected a string"),
    "an answered prompt": ([FINE], [{"prompt": [{"role": "assistant", "content": "p"}]}], [], "end the prompt with"),
    "two prompts of one id": ([FINE], ["p", {"prompt_id": "p", "prompt": "q"}], [], "expected one prompt an id"),
    "another ending": ([FINE], ["p"], ["-o", "out.json"], "expected a file name ending in .jsonl"),
}


@pytest.mark.parametrize(("sources", "prompts", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_asked(sources, prompts, flags, words, sample, capsys, tmp_path):
    assert sample(sources, prompts, *flags) == 2
    shown = capsys.readouterr().err
    assert words.lower() in shown.lower()
    assert shown.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_package_is_named_before_anything_is_asked(sample, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert sample([FINE], ["p"]) == 2
    assert "entry 1: needs the package openai: pip install 'wrpo[sample]'" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["[" * 3000, "- " + "9" * 5000, "- 2024-13-01", "- !!bool perhaps", "- model: [a"])
def test_a_sources_file_that_cannot_be_read_is_one_line(text, sample, tmp_path, capsys):
    sample([FINE], ["p"], "--samples", "0")  # writes the files
    (tmp_path / "sources.yaml").write_text(text)
    capsys.readouterr()
    arguments = [str(tmp_path / name) for name in ("sources.yaml", "prompts.jsonl")]
    assert cli.main(["sample", *arguments, "-o", str(tmp_path / "out.jsonl")]) == 2
    shown = capsys.readouterr().err
    assert "sources.yaml: " in shown
    assert shown.count("\n") == 1
