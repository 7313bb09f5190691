"""Candidates that cannot be right: named with file and row, or left out and counted; never half used."""

from __future__ import annotations

import gzip
import math

import pytest
from scored_answers import answers, write_lines

from wrpo import cli
from wrpo.building import BuildSettings, build_rows
from wrpo.data import DataError

ALL_TRIPLES = BuildSettings(sft_share=0)
SKIPPING = BuildSettings(sft_share=0, skip_bad_rows=True)
A = answers("a", big=[0.5, 0.9], small=[0.7], target=[0.2, 0.6, 0.1])

BAD = {
    "no reward": ("reward", {"reward": None}),
    "reward is NaN": ("reward", {"reward": math.nan}),
    "reward is infinite": ("reward", {"reward": math.inf}),
    "reward is too large for sums": ("reward", {"reward": 1e300}),
    "reward is too large for a float": ("reward", {"reward": -(10**400)}),
    "reward is text": ("reward", {"reward": "0.5"}),
    "reward is a truth value": ("reward", {"reward": True}),
    "no response": ("response", {"response": None}),
    "half a character": ("response", {"response": "\ud83d"}),
    "no model": ("model", {"model": None}),
    "no prompt_id": ("prompt_id", {"prompt_id": ""}),
    "prompt_id is a number": ("prompt_id", {"prompt_id": 7}),
    "prompt is a number": ("prompt", {"prompt": 3}),
    "prompt is empty": ("prompt", {"prompt": " "}),
    "prompt ends with an answer": ("prompt", {"prompt": [{"role": "assistant", "content": "hm"}]}),
    "sample is text": ("sample", {"sample": "first"}),
    "sample is negative": ("sample", {"sample": -1}),
    "sample is no whole number": ("sample", {"sample": 0.5}),
}


@pytest.mark.parametrize(("field", "change"), BAD.values(), ids=BAD)
def test_a_bad_candidate_is_named_or_skipped_and_counted(field, change):
    rows = [A[0], A[1] | change, *A[2:]]
    with pytest.raises(DataError, match=f"rows, row 2, field '{field}'"):
        build_rows(rows, ALL_TRIPLES)
    (triple,), _, _, report = build_rows(rows, SKIPPING)
    assert triple["source_chosen"] == ["a/small/0"], "the bad row was the best source answer"
    assert str(report).startswith("5 candidates for 1 prompts -> 1 triples; 1 bad row skipped")


def test_a_row_that_stands_there_twice_counts_once():
    (triple,), _, _, report = build_rows([*A, A[1], A[5]], ALL_TRIPLES)
    assert [triple] == build_rows(A, ALL_TRIPLES).triples
    assert report.dropped_answers == {"the same row again": 2}


@pytest.mark.parametrize(("change", "what"), [({"response": "else"}, "text"), ({"reward": 0.4}, "reward")])
def test_two_answers_under_one_number_contradict_each_other_and_both_are_left_out(change, what):
    rows = [*A, A[1] | change]
    words = f"rows, row [27], field 'sample': expected one answer of 'big' with sample 1 .* another {what} than in rows"
    with pytest.raises(DataError, match=words):
        build_rows(rows, ALL_TRIPLES)
    (triple,), _, _, report = build_rows(rows, SKIPPING)
    assert triple["source_chosen"] == ["a/small/0"]
    assert "2 bad rows skipped (sample 2; first: rows, row" in report.bad_rows


def test_two_prompts_under_one_id_contradict_each_other_and_the_prompt_is_left_out():
    rows = [*A, *answers("b", big=[0.9], target=[0.1, 0.2])]
    rows[3] = rows[3] | {"prompt": "another question"}
    with pytest.raises(
        DataError, match=r"row [14], field 'prompt': expected the prompt that 'a' has in rows, row [14]"
    ):
        build_rows(rows, ALL_TRIPLES)
    (triple,), _, _, report = build_rows(rows, SKIPPING)
    assert triple["prompt_id"] == "b"
    assert report.dropped_prompts == {"two prompts under one prompt_id": 1}
    assert "6 bad rows skipped (prompt 6; first: rows, row" in report.bad_rows


def test_a_prompt_is_the_same_as_text_and_as_a_message():
    rows = [A[0] | {"prompt": [{"role": "user", "content": A[0]["prompt"]}]}, *A[1:]]
    assert build_rows(rows, ALL_TRIPLES).triples == build_rows(A, ALL_TRIPLES).triples


def test_a_conversation_is_a_prompt():
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    (triple,) = build_rows([row | {"prompt": talk} for row in A], ALL_TRIPLES).triples
    assert triple["prompt"] == talk


# -- files, through the command ---------------------------------------------------------------------------------------


def spoil_nothing(path):
    return path


def cut_off(path):
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes())[:-20])
    return packed


def not_packed(path):
    return path.rename(path.with_suffix(".jsonl.gz"))


def not_parquet(path):
    return path.rename(path.with_suffix(".parquet"))


def its_folder(path):
    return path.parent


FILES = {
    "broken line": ([*A, '{"prompt_id": "a", "pro'], spoil_nothing, "candidates.jsonl, row 7: expected valid JSON"),
    "a line that is no object": ([*A, "[1]"], spoil_nothing, "candidates.jsonl, row 7: expected an object"),
    "empty file": ([], spoil_nothing, "expected at least one SFT row or triple, got 0 candidates"),
    "only one answer of the target": (A[:4], spoil_nothing, "no two answers of 'target' that differ"),
    "gzip cut off": (A, cut_off, "candidates.jsonl.gz: expected a whole gzip file"),
    "gzip that is none": (A, not_packed, "candidates.jsonl.gz: expected a whole gzip file"),
    "Parquet that is none": (A, not_parquet, "candidates.parquet: expected a Parquet file"),
    "a folder": (A, its_folder, "expected a folder of save_to_disk, got another folder. Name the files in it"),
    "no such file": (A, lambda path: path.with_suffix(".json"), "candidates.json: no such file"),
    "a glob that matches nothing": (A, lambda path: path.with_name("no*.jsonl"), "no*.jsonl: no such file"),
    "another kind of file": (A, lambda path: path.rename(path.with_suffix(".csv")), "a file ending in one of .jsonl"),
}


@pytest.mark.parametrize(("lines", "spoil", "words"), FILES.values(), ids=FILES)
def test_candidates_that_cannot_be_read_are_one_line_and_leave_nothing(lines, spoil, words, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    candidates = spoil(write_lines(lines, folder / "candidates.jsonl"))
    assert cli.main(["build", str(candidates), "-o", str(tmp_path / "out"), "--sft_share", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("wrpo build: ") and words in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.glob("out/*")) == []


OUTPUTS = {
    "a file where the folder should be": (["-o", "taken"], "File exists: '{0}/taken'"),
    "a file on the way to the folder": (["-o", "taken/out"], "Not a directory: '{0}/taken/out'"),
    "no folder for temporary files": (["-o", "out", "--temp_dir", "nowhere"], "temp_dir: {0}/nowhere is no folder"),
    "an unknown setting": (["-o", "out", "--num_source", "2"], "did you mean 'num_sources'"),
    "a setting out of range": (
        ["-o", "out", "--num_sources", "0"],
        "num_sources: expected a whole number >= 1, got 0",
    ),
    "no tokenizer there": (["-o", "out", "--tokenizer", "nowhere", "--max_tokens", "9"], "tokenizer '{0}/nowhere'"),
    "no output named": ([], "output_dir: expected a value, got none. Give it as --output_dir, or in the settings file"),
}


@pytest.mark.parametrize(("flags", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_one_line(flags, words, tmp_path, capsys):
    write_lines(A, tmp_path / "candidates.jsonl")
    (tmp_path / "taken").write_text("mine")
    here = [str(tmp_path / f) if f in ("out", "taken", "taken/out", "nowhere") else f for f in flags]
    assert cli.main(["build", str(tmp_path / "candidates.jsonl"), *here]) == 2
    shown = capsys.readouterr().err
    assert words.format(tmp_path) in shown
    assert shown.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"
    assert not (tmp_path / "out" / "triples.jsonl").exists()
