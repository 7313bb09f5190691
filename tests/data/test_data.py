"""Every form and kind of file loads to one row, every bad row is named, nothing is lost."""

from __future__ import annotations

import gzip
import json
import pickle
import re

import datasets
import pytest

from wrpo.data import DataError, load_triples

USER = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "be brief"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


EXPLICIT = {"prompt": "2 + 3?", "source_chosen": "five", "target_chosen": "5", "rejected": "6"}
RELEASED = {"prompt": "2 + 3?", "chosen": ["five", "5"], "rejected": ["6"]}
LOADED = {
    "prompt": [USER],
    "source_chosen": ["five"],
    "source_weight": [1.0],
    "source_model": [None],
    "source_reward": None,
    "target_chosen": "5",
    "rejected": "6",
    "source_logp": None,
}
OF_TARGETS = ("target_chosen", "rejected", "source_logp")


def loaded(row: dict, **options) -> dict:
    triple = load_triples([row], **options)[0]
    return {name: value for name, value in triple.items() if name not in ("file", "row")}


# -- forms and files --------------------------------------------------------------------------------------------------

SAME_TRIPLE = {
    "explicit": EXPLICIT,
    "explicit, one source in a list": EXPLICIT | {"source_chosen": ["five"], "source_weight": 1.0},
    "released": RELEASED,
    "released, rejected without its list": RELEASED | {"rejected": "6"},
    "prompt as a message": RELEASED | {"prompt": USER},
    "responses as messages": {"prompt": [USER], "chosen": [said("five"), said("5")], "rejected": [said("6")]},
    "responses as lists of one message": RELEASED
    | {"chosen": [[said("five")], [said("5")]], "rejected": [[said("6")]]},
    "prompt repeated before each response": {
        "prompt": "2 + 3?",
        "chosen": [[USER, said("five")], [USER, said("5")]],
        "rejected": [[USER, said("6")]],
    },
    "one rejected conversation without its list": RELEASED | {"rejected": [USER, said("6")]},
    "prompt only in the responses": {"chosen": [[USER, said("five")], "5"], "rejected": ["6"]},
    "explicit with a conversation": EXPLICIT | {"source_chosen": [USER, said("five")], "target_chosen": said("5")},
    "columns of other forms left empty": EXPLICIT | {"chosen": None, "source_weight": None, "source_model": None},
}


@pytest.mark.parametrize("row", SAME_TRIPLE.values(), ids=SAME_TRIPLE)
def test_every_form_loads_to_the_same_triple(row):
    assert loaded(row) == LOADED


def test_the_entries_of_chosen_before_the_last_are_sources():
    triple = loaded(
        RELEASED | {"chosen": ["five", "V", "5"], "source_model": ["a", "b"], "source_weight": [0.25, 0.75]}
    )
    assert (triple["source_chosen"], triple["target_chosen"]) == (["five", "V"], "5")
    assert (triple["source_model"], triple["source_weight"]) == (["a", "b"], [0.25, 0.75])


def test_rewards_and_log_probs_of_the_sources_are_kept():
    row = loaded(EXPLICIT | {"source_reward": 3, "source_logp": [[-1, -0.5], [0, -1], [-2, -3]]})
    assert row["source_reward"] == [3.0]
    assert row["source_logp"] == [[-1.0, -0.5], [0.0, -1.0], [-2.0, -3.0]]


def test_sources_share_equally_when_no_weight_is_given():
    assert loaded(EXPLICIT | {"source_chosen": ["a", "b", "c", "d"]})["source_weight"] == [0.25] * 4


def test_a_system_turn_in_the_repeated_prompt_is_part_of_the_prompt():
    row = {"prompt": "2 + 3?", "chosen": [[SYSTEM, USER, said("five")], "5"], "rejected": "6"}
    assert loaded(row)["prompt"] == [SYSTEM, USER]


def test_loading_a_loaded_triple_changes_nothing():
    once = load_triples([EXPLICIT, RELEASED])
    assert loaded(once[1]) == LOADED


def test_sft_rows_need_no_target_answers():
    for row in ({"prompt": "2 + 3?", "source_chosen": "five"}, {"prompt": "2 + 3?", "chosen": ["five"]}, RELEASED):
        assert loaded(row, targets=False) == {k: v for k, v in LOADED.items() if k not in OF_TARGETS}


def test_sft_takes_one_answer_a_row():
    """As `wrpo sample` writes it, or anybody else."""
    row = {"prompt": "2 + 3?", "response": "five", "model": "a", "reward": 0.5}
    assert loaded(row, targets=False) == {k: v for k, v in LOADED.items() if k not in OF_TARGETS}
    assert loaded({"prompt": "2 + 3?", "response": [{"role": "assistant", "content": "five"}]}, targets=False)
    for empty in (["five", "V"], "", 5):
        with pytest.raises(DataError, match="response"):
            loaded({"prompt": "2 + 3?", "response": empty}, targets=False)


@pytest.mark.parametrize(("targets", "row"), [(True, {"prompt": "p", "response": "r"}), (False, {"prompt": "p"})])
def test_a_row_of_no_form_is_told_the_forms(targets, row):
    forms = "'source_chosen', 'target_chosen', 'rejected'}" if targets else r"{'prompt', 'response'}"
    with pytest.raises(DataError, match=rf"fields \['prompt'.*A row is .*{re.escape(forms)}"):
        loaded(row, targets=targets)


def write(folder, kind: str, rows: list[dict]):
    """The rows in a file or folder of this kind."""
    path = folder / kind
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "lines.jsonl" or kind == "lines.json":
        path.write_bytes(lines)
    elif kind == "lines.jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "array.json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == "table.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "kind", ["lines.jsonl", "lines.json", "lines.jsonl.gz", "array.json", "table.parquet", "saved", "splits"]
)
def test_every_kind_of_file_loads(kind, tmp_path):
    path = write(tmp_path, kind, [EXPLICIT | {"rejected": "7"}, EXPLICIT])
    triples = load_triples(path)
    assert triples["rejected"][:] == ["7", "6"]
    assert (triples[1]["file"], triples[1]["row"]) == (str(path), 2)


def test_several_files_load_one_after_the_other(tmp_path):
    paths = [write(tmp_path, kind, [EXPLICIT]) for kind in ("array.json", "lines.jsonl")]
    assert load_triples(paths)["file"][:] == [str(path) for path in paths]


# -- bad rows ---------------------------------------------------------------------------------------------------------

BAD = {
    "no prompt": ({"chosen": ["a", "b"], "rejected": ["c"]}, "prompt", "no such field"),
    "prompt is a number": (RELEASED | {"prompt": 3}, "prompt", "got 3"),
    "blank prompt": (RELEASED | {"prompt": " \n"}, "prompt.*not empty", ""),
    "message without a role": (RELEASED | {"prompt": {"content": "hi"}}, "prompt", "with a role"),
    "message without content": (RELEASED | {"prompt": {"role": "user"}}, r"prompt\.content", "NoneType"),
    "content in parts": (
        RELEASED | {"prompt": {"role": "user", "content": [{"type": "text"}]}},
        r"prompt\.content",
        "list",
    ),
    "prompt ends with an answer": (RELEASED | {"prompt": [USER, said("5")]}, "prompt", "not the assistant's"),
    "no form at all": ({"prompt": "hi", "response": "ho"}, "fields", r"\['prompt', 'response'\]"),
    "one chosen": (RELEASED | {"chosen": ["a"]}, "chosen", "1 answer"),
    "one chosen conversation": (RELEASED | {"chosen": [USER, said("a")]}, "chosen", "1 answer"),
    "empty chosen": (RELEASED | {"chosen": []}, "chosen", "an empty list"),
    "two rejected": (RELEASED | {"rejected": ["a", "b"]}, "rejected", "got 2"),
    "no rejected": ({"prompt": "a", "chosen": ["a", "b"]}, "rejected", "no such field"),
    "rejected is null": (RELEASED | {"rejected": None}, "rejected", "got none"),
    "rejected is a number": (EXPLICIT | {"rejected": 6}, "rejected", "got 6"),
    "no target": ({"prompt": "a", "source_chosen": "b", "rejected": "c"}, "target_chosen", "no such field"),
    "blank response": (RELEASED | {"chosen": ["five", "\n"]}, r"chosen\[1\]", "not empty"),
    "response is a number": (EXPLICIT | {"source_chosen": ["five", 5]}, r"source_chosen\[1\]", "got 5"),
    "response ends with the user": (RELEASED | {"rejected": [[said("a"), USER]]}, "rejected", "role 'user'"),
    "prompts differ": (RELEASED | {"chosen": [[USER, said("a")], [SYSTEM, USER, said("b")]]}, r"chosen\[1\]", "same"),
    "another prompt": (RELEASED | {"prompt": "4 + 4?", "rejected": [[USER, said("6")]]}, "prompt", "4 \\+ 4"),
    "half a surrogate pair": (EXPLICIT | {"rejected": "a\ud83d"}, "rejected", "UTF-8"),
    "weight too many": (EXPLICIT | {"source_weight": [0.5, 0.5]}, "source_weight", "1 number"),
    "weight negative": (
        EXPLICIT | {"source_chosen": ["a", "b"], "source_weight": [1.5, -0.5]},
        "source_weight",
        ">= 0",
    ),
    "weight NaN": (EXPLICIT | {"source_weight": [float("nan")]}, "source_weight", "nan"),
    "weights short of 1": (
        EXPLICIT | {"source_chosen": ["a", "b"], "source_weight": [0.5, 0.4]},
        "source_weight",
        "0.9",
    ),
    "weight beyond any float": (
        EXPLICIT | {"source_chosen": ["a", "b"], "source_weight": [10**400, 1]},
        "source_weight",
        "sum inf",
    ),
    "weights whose sum is beyond": (
        EXPLICIT | {"source_chosen": ["a", "b"], "source_weight": [1e308, 1e308]},
        "source_weight",
        "sum inf",
    ),
    "reward beyond any float": (EXPLICIT | {"source_reward": [10**400]}, "source_reward", "1 finite number"),
    "log-prob beyond any float": (EXPLICIT | {"source_logp": [[-(10**400)]] * 3}, "source_logp", "finite mean"),
    "model that is no text": (EXPLICIT | {"source_model": ["\ud800"]}, "source_model", "half a surrogate pair"),
    "role that is no text": (
        EXPLICIT | {"prompt": [{"role": "\ud800", "content": "hi"}]},
        "prompt.role",
        "half a surrogate pair",
    ),
    "weight is text": (EXPLICIT | {"source_weight": "1"}, "source_weight", "'1'"),
    "too few models": (EXPLICIT | {"source_chosen": ["a", "b"], "source_model": ["m"]}, "source_model", "2 names"),
    "model is a number": (EXPLICIT | {"source_model": 7}, "source_model", "got 7"),
    "too few rewards": (EXPLICIT | {"source_reward": []}, "source_reward", "1 finite number"),
    "reward infinite": (EXPLICIT | {"source_reward": [float("inf")]}, "source_reward", "inf"),
    "log-probs of sources alone": (EXPLICIT | {"source_logp": [[-1.0]]}, "source_logp", "3 lists"),
    "log-probs of other models": (EXPLICIT | {"source_logp": [[-1.0], [-1.0, -2.0], [-1.0]]}, "source_logp", "3 lists"),
    "log-probs of no model": (EXPLICIT | {"source_logp": [[], [], []]}, "source_logp", "3 lists"),
    "log-prob above zero": (EXPLICIT | {"source_logp": [[-1.0], [0.5], [-1.0]]}, "source_logp", "at most 0"),
    "log-prob is NaN": (EXPLICIT | {"source_logp": [[-1.0], [-1.0], [float("nan")]]}, "source_logp", "finite"),
}


@pytest.mark.parametrize(("row", "field", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_with_row_and_field(row, field, words):
    with pytest.raises(DataError, match=rf"^rows, row 2.*{field}.*{words}"):
        load_triples([EXPLICIT, row])


@pytest.mark.parametrize(("row", "field", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_is_skipped_and_counted_when_asked(row, field, words, caplog):
    triples = load_triples([EXPLICIT, row, RELEASED], skip_bad_rows=True)
    assert triples["row"][:] == [1, 3]
    assert len(caplog.records) == 1
    assert "2 rows loaded, 1 bad row skipped" in caplog.text
    assert "rows, row 2" in caplog.text


LINE = json.dumps(EXPLICIT).encode()
BROKEN = {
    "cut line": (LINE[:40], "valid JSON"),
    "not UTF-8": (LINE.replace(b"five", b"f\xffve"), "UTF-8 text, got byte 0xff at byte 41"),
    "not an object": (b"[1]", "an object"),
    "a number": (b"3", "an object"),
    "a number of 5000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "JSON that Python can read"),
    "brackets in brackets": (b'{"prompt": ' + b"[" * 100_000 + b"}", "JSON that Python can read"),
}


@pytest.mark.parametrize(("line", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_by_its_line_number(line, words, tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_bytes(b"\n".join([LINE, b"", line, LINE]))
    with pytest.raises(DataError, match=f"triples.jsonl, row 3: expected {words}"):
        load_triples(path)
    assert load_triples(path, skip_bad_rows=True)["row"][:] == [1, 4]


def test_a_parquet_cell_that_is_not_utf8_is_named_by_its_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([EXPLICIT, EXPLICIT | {"rejected": "#"}])
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.array(["6", "#"]).buffers()[1], pa.py_buffer(b"6\xff")])
    pq.write_table(table.set_column(table.column_names.index("rejected"), "rejected", broken), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 2: expected UTF-8 text, got byte 0xff"):
        load_triples(tmp_path / "t.parquet")
    assert load_triples(tmp_path / "t.parquet", skip_bad_rows=True)["row"][:] == [1]


def test_a_parquet_file_cut_within_its_pages_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "cut.parquet"
    pq.write_table(pa.Table.from_pylist([EXPLICIT] * 50), path, compression="zstd")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(DataError, match=r"cut\.parquet: expected a Parquet file that is whole"):
        load_triples(path)


def test_a_link_to_nowhere_is_no_such_file(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link.jsonl", tmp_path / "li*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"link\.jsonl: no such file"):
            load_triples(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]"])
def test_an_empty_file_is_an_error(content, tmp_path):
    (tmp_path / "empty.json").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.json: expected at least one triple"):
        load_triples(tmp_path / "empty.json")


def test_a_source_without_a_good_row_is_an_error_even_when_bad_rows_are_skipped():
    with pytest.raises(DataError, match="no rows and 1 bad row skipped"):
        load_triples([RELEASED | {"rejected": ""}], skip_bad_rows=True)


def test_a_source_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "notes.txt").write_text("hi")
    write(tmp_path, "splits", [EXPLICIT])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_triples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"notes\.txt: expected .*\.parquet"):
        load_triples(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"a split out of \['train'\], got 'test'"):
        load_triples(tmp_path / "splits", split="test")
    with pytest.raises(TypeError, match="got int"):
        load_triples(3)


def test_an_error_survives_the_way_between_processes():
    error = DataError("text", "3", "Write text.", field="prompt", file="a.jsonl", row=4)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.row) == (str(error), "prompt", 4)
