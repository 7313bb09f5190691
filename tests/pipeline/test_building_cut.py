"""Answers that were cut: left out of training data and counted, or taken and never taught as an end."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored_answers import answers, write_lines
from scripted_server import completion, said, serving
from tiny_tokenizer import CHATML, HEADERS, tiny_tokenizer

from wrpo import cli
from wrpo.building import BuildSettings, build_rows
from wrpo.data import DataError, load_examples, tokenize_examples

A = answers("a", big=[0.9, 0.5], small=[0.7], target=[0.6, 0.3, 0.1])
TRIPLES, KEPT = BuildSettings(sft_share=0), BuildSettings(sft_share=0, cut_answers="keep")
SFT = BuildSettings(sft_share=1)


def ended(rows: list[dict], **reasons: str) -> list[dict]:
    """The rows; those of `model_sample` ended for that reason, the others by themselves."""
    return [row | {"finish_reason": reasons.get(f"{row['model']}_{row['sample']}", "stop")} for row in rows]


def test_a_cut_answer_is_no_answer_and_is_counted():
    rows = ended(A, big_0="length", target_0="length", target_2="length")
    built = build_rows([*rows, *answers("b", big=[0.2], target=[0.5, 0.4])], TRIPLES)
    (triple,) = [triple for triple in built.triples if triple["prompt_id"] == "a"] or [None]
    assert triple is None, "the target has one whole answer"
    assert built.report.dropped_answers["cut before the model had ended it"] == 3
    assert "3  cut before the model had ended it" in str(built.report)
    (row,) = build_rows(rows, SFT).sft
    assert row["source_chosen"] == ["a/small/0"]


@pytest.mark.parametrize("reason", ["length", "LENGTH", "max_tokens", "MAX_TOKENS", "model_length", "content_filter"])
def test_servers_have_several_words_for_a_cut(reason):
    (row,) = build_rows(ended(A, big_0=reason), SFT).sft
    assert row["source_chosen"] == ["a/small/0"]


@pytest.mark.parametrize("reason", ["stop", "eos_token", "stop_sequence", "end_turn", "tool_calls", None])
def test_an_answer_that_ended_otherwise_or_without_a_word_is_whole(reason):
    (row,) = build_rows(ended(A, big_0=reason), SFT).sft
    assert row == build_rows(A, SFT).sft[0]
    assert row["source_chosen"] == ["a/big/0"]


def test_reasons_that_no_server_is_known_to_give_are_counted_and_taken_as_ended():
    rows = ended(A, big_0="ran out of money", target_0="stop", target_2="ran out of money")
    built = build_rows(rows, SFT)
    assert built.sft[0]["source_chosen"] == ["a/big/0"]
    assert built.report.unknown_reasons == {"'ran out of money'": 2}
    assert "candidates of a finish_reason that is not known, taken as ended\n          2  'ran" in str(built.report)
    assert "is not known" not in str(build_rows(ended(A, big_0="length"), SFT).report)


def test_cut_answers_that_are_kept_are_marked_in_the_order_of_the_responses():
    rows = ended(A, big_0="length", target_2="length")
    (triple,) = build_rows(rows, BuildSettings(sft_share=0, cut_answers="keep", num_sources=2)).triples
    assert triple["source_chosen"] == ["a/big/0", "a/small/0"]
    assert triple["cut"] == [True, False, False, True]
    (example,) = load_examples([triple])
    assert example["cut"] == [True, False, False, True]
    (row,) = build_rows(rows, BuildSettings(sft_share=1, cut_answers="keep")).sft
    assert row["cut"] == [True]
    assert load_examples([row], stage="sft")[0]["cut"] == [True]


def test_a_row_of_a_tie_marks_its_cut_answers_too():
    rows = ended(answers("t", big=[1.0], target=[0.0, 0.0]), target_1="length")
    (row,) = build_rows(rows, BuildSettings(sft_share=0, ties="source", cut_answers="keep")).triples
    assert (row["rejected"], row["cut"]) == ("t/target/1", [False, True])


def test_a_set_without_a_cut_answer_is_the_same_whatever_would_become_of_one():
    assert build_rows(ended(A), KEPT).triples == build_rows(A, TRIPLES).triples
    assert "cut" not in build_rows(ended(A), KEPT).triples[0]


def test_the_report_says_how_many_cut_answers_were_taken():
    report = build_rows(ended(A, big_0="length", target_2="length"), KEPT).report
    assert "\n2 responses in them are cut, and train without an end\n" in str(report)
    assert report.as_json()["cut"] == 2


def test_when_all_is_cut_the_error_says_so():
    rows = ended(A, **{f"{row['model']}_{row['sample']}": "length" for row in A})
    with pytest.raises(DataError, match=r"cut before the model had ended it 3.*--cut_answers keep"):
        build_rows(rows, SFT)


def test_one_answer_that_is_cut_and_is_not_contradicts_itself():
    rows = [*ended(A), A[0] | {"finish_reason": "length"}]
    with pytest.raises(DataError, match="another finish_reason than in"):
        build_rows(rows, TRIPLES)


def test_a_finish_reason_that_is_no_text_is_named():
    with pytest.raises(DataError, match=r"row 1, field 'finish_reason': expected text, got 1"):
        build_rows([A[0] | {"finish_reason": 1}, *A[1:]], TRIPLES)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_mark_survives_every_form_of_file(form, tmp_path):
    rows = ended(A, big_0="length") + answers("b", big=[0.9], target=[0.6, 0.1])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
    command = ["build", str(tmp_path / "scored.parquet"), "-o", str(tmp_path / "out"), "--sft_share", "0"]
    assert cli.main([*command, "--format", form, "--cut_answers", "keep"]) == 0
    loaded = load_examples(tmp_path / "out" / f"triples.{form}")
    assert sorted(loaded["cut"], key=str) == [None, [True, False, False]]


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_from_sampling_to_token_ids_a_cut_answer_never_gets_an_end(template, tmp_path, monkeypatch):
    """The flag travels from the server's reply through sample, score and build to the ids that are trained."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "longest_is_best.py").write_text("def reward(prompt, response): return len(response)")
    write_lines([{"prompt_id": "p", "prompt": "2 + 3?"}], tmp_path / "prompts.jsonl")

    def script(body, attempt):
        cut = body["model"] == "long"
        return completion(f"{said(body)} five, of cour" if cut else "five, of", "length" if cut else "stop")

    with serving(script) as server:
        entries = [f"- {{model: {name}, kind: server, base_url: '{server.url}'}}\n" for name in ("long", "target")]
        (tmp_path / "sources.yaml").write_text("".join(entries))
        assert cli.main(["sample", "sources.yaml", "prompts.jsonl", "-o", "answers.jsonl", "--samples", "1"]) == 0
    assert cli.main(["score", "answers.jsonl", "-o", "s.jsonl", "--verifier", "longest_is_best:reward"]) == 0
    assert cli.main(["build", "s.jsonl", "-o", "out", "--sft_share", "1", "--cut_answers", "keep"]) == 0
    tokenizer = tiny_tokenizer(template)
    (row,) = tokenize_examples(load_examples("out/sft.jsonl", stage="sft"), tokenizer)
    assert tokenizer.decode(row["response_ids"][0]) == "2 + 3? five, of cour"
