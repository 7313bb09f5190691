"""Every kind of file loads, every bad row is named with its place, nothing is lost."""

from __future__ import annotations

import gzip
import json
import pickle

import datasets
import pytest

from wrpo.data.loading import load_examples, load_hub
from wrpo.rows.errors import DataError

PAIR = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}
USER = {"role": "user", "content": "2 + 3?"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


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
    path = write(tmp_path, kind, [PAIR | {"rejected": "7"}, PAIR])
    examples = load_examples(path)
    assert [json.loads(responses[-1])["content"] for responses in examples["responses"]] == ["7", "6"]
    assert (examples[1]["file"], examples[1]["row"]) == (str(path), 2)


def test_several_files_load_one_after_the_other(tmp_path):
    paths = [write(tmp_path, kind, [PAIR]) for kind in ("array.json", "lines.jsonl")]
    assert load_examples(paths)["file"][:] == [str(path) for path in paths]


def test_messages_tools_and_options_are_json_text_and_nothing_is_null_text():
    tools = [{"name": "ädd"}]
    one, other = load_examples([PAIR, PAIR | {"tools": tools, "chat_template_kwargs": {"a": 1}}])
    assert (json.loads(one["prompt"]), json.loads(one["responses"][0])) == ([USER], said("5"))
    assert (one["tools"], one["chat_template_kwargs"]) == (None, None)
    assert (json.loads(other["tools"]), json.loads(other["chat_template_kwargs"])) == (tools, {"a": 1})


# -- tables have nulls where other rows have fields -------------------------------------------------------------------

CALLS = [{"function": {"name": "add", "arguments": {"a": 2, "b": None}}}]
CALLING = {"prompt": [USER], "chosen": [{"role": "assistant", "tool_calls": CALLS}], "rejected": [said("6")]}
NAMED = {"prompt": [USER | {"name": "Ann"}], "chosen": [said("5")], "rejected": [said("6")]}


@pytest.mark.parametrize("kind", ["table.parquet", "saved"])
def test_a_table_invents_no_fields_of_messages(kind, tmp_path):
    calling, named = load_examples(write(tmp_path, kind, [CALLING, NAMED]))
    assert json.loads(named["prompt"]) == NAMED["prompt"]
    assert json.loads(named["responses"][0]) == said("5")
    assert json.loads(calling["prompt"]) == [USER]
    assert json.loads(calling["responses"][0]) == {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
    }


def test_a_null_that_somebody_wrote_as_an_argument_is_kept(tmp_path):
    (example,) = load_examples(write(tmp_path, "lines.jsonl", [CALLING]))
    assert json.loads(example["responses"][0])["tool_calls"] == CALLS


def test_messages_that_a_table_keeps_as_json_text_are_read(tmp_path):
    rows = [CALLING | {"rejected": "6"}, NAMED | {"chosen": [said("5") | {"tool_calls": [{"function": "add"}]}]}]
    rows[1]["rejected"] = "7"
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(tmp_path / "mixed.parquet")
    for source in (table, tmp_path / "mixed.parquet"):
        calling, named = load_examples(source)
        assert json.loads(calling["responses"][0])["tool_calls"][0]["function"]["name"] == "add"
        assert json.loads(named["responses"][0])["tool_calls"] == [{"function": "add"}]


# -- hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the layout of a data set on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    for config, split, text in (("plain", "train", "5"), ("plain", "test", "V"), ("odd", "train", "five")):
        (folder / config).mkdir(parents=True, exist_ok=True)
        (folder / config / f"{split}.jsonl").write_text(json.dumps(PAIR | {"chosen": text}) + "\n")
    configs = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits],
        }
        for config, splits in (("plain", ["train", "test"]), ("odd", ["train"]))
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return str(folder)


@pytest.mark.parametrize(
    ("config", "split", "text"), [("plain", "train", "5"), ("plain", "test", "V"), ("odd", "train", "five")]
)
def test_a_data_set_in_the_layout_of_the_hub_loads(hub, config, split, text):
    (example,) = load_examples(load_hub(hub, config, split))
    assert json.loads(example["responses"][0])["content"] == text


@pytest.mark.parametrize(
    ("name", "config", "split", "words"),
    [
        (None, "plain", "dev", "with the split 'dev' and the configuration 'plain', got .*dev"),
        (None, "other", "train", "configuration 'other', got .*other"),
        (None, None, "train", "a data set with the split 'train', got .*Config name is missing"),
        ("nowhere/nothing", None, "train", "nowhere/nothing: expected a data set"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(hub, name, config, split, words):
    with pytest.raises(DataError, match=words) as error:
        load_hub(name or hub, config, split)
    assert "\n" not in str(error.value)


# -- bad rows ---------------------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_with_its_row():
    with pytest.raises(DataError, match=r"^rows, row 2, field 'rejected': "):
        load_examples([PAIR, PAIR | {"rejected": 6}])


def test_a_bad_row_is_skipped_and_counted_when_asked(caplog):
    examples = load_examples([PAIR, PAIR | {"rejected": 6}, PAIR], skip_bad_rows=True)
    assert examples["row"][:] == [1, 3]
    assert len(caplog.records) == 1
    assert "2 rows loaded, 1 bad row skipped (rejected 1" in caplog.text
    assert "rows, row 2" in caplog.text


LINE = json.dumps(PAIR | {"chosen": "five"}).encode()
BROKEN = {
    "cut line": (LINE[:40], "valid JSON"),
    "not UTF-8": (LINE.replace(b"five", b"f\xffve"), "UTF-8 text, got byte 0xff at byte 34"),
    "not an object": (b"[1]", "an object"),
    "a number": (b"3", "an object"),
    "a number of 5000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "JSON that Python can read"),
    "a field twice": (LINE[:-1] + b', "chosen": "six"}', "each field once, got 'five' and 'six'"),
    "a field twice within": (
        LINE.replace(b'"five"', b'[{"role": "assistant", "role": "user", "content": "5"}]'),
        "each field once",
    ),
    "brackets in brackets": (b'{"prompt": ' + b"[" * 100_000 + b"}", "JSON that Python can read"),
}


@pytest.mark.parametrize(("line", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_by_its_line_number(line, words, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([LINE, b"", line, LINE]))
    with pytest.raises(DataError, match=f"pairs.jsonl, row 3(, field '\\w+')?: expected {words}"):
        load_examples(path)
    assert load_examples(path, skip_bad_rows=True)["row"][:] == [1, 4]


def test_a_parquet_cell_that_is_not_utf8_is_named_by_its_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([PAIR, PAIR | {"rejected": "#"}])
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.array(["6", "#"]).buffers()[1], pa.py_buffer(b"6\xff")])
    pq.write_table(table.set_column(table.column_names.index("rejected"), "rejected", broken), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 2: expected UTF-8 text, got byte 0xff"):
        load_examples(tmp_path / "t.parquet")
    assert load_examples(tmp_path / "t.parquet", skip_bad_rows=True)["row"][:] == [1]


def test_tools_as_text_with_a_field_twice_are_refused():
    with pytest.raises(DataError, match=r"row 1, field 'tools': expected each field once, got 'a' and 'b' for 'name'"):
        load_examples([PAIR | {"tools": '[{"name": "a", "name": "b"}]'}])


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array(["2 + 3?"]), pa.array(["5"]), pa.array(["6"]), pa.array(["7"])]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: expected each column once, got several 'chosen'"):
        load_examples(tmp_path / "t.parquet")


def test_rows_whose_answers_are_messages_of_the_assistant_alone_are_counted(caplog):
    two = {"prompt": "2 + 3?", "chosen": [said("five"), said("5")], "rejected": [said("6")]}
    load_examples([two, PAIR, two | {"chosen": json.dumps(two["chosen"])}, PAIR | {"chosen": [said("5")]}])
    assert "rows: in 2 rows chosen or rejected is a list of the assistant's messages alone" in caplog.text
    caplog.clear()
    load_examples([PAIR, two | {"chosen": [[said("five")], [said("5")]]}, two | {"chosen": ["five", "5"]}])
    assert "messages alone" not in caplog.text


def test_a_parquet_file_cut_within_its_pages_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "cut.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR] * 50), path, compression="zstd")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(DataError, match=r"cut\.parquet: expected a Parquet file that is whole"):
        load_examples(path)


def test_a_link_to_nowhere_is_no_such_file(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link.jsonl", tmp_path / "li*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"link\.jsonl: no such file"):
            load_examples(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]"])
def test_an_empty_file_is_an_error(content, tmp_path):
    (tmp_path / "empty.json").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.json: expected at least one row"):
        load_examples(tmp_path / "empty.json")


def test_a_source_without_a_good_row_is_an_error_even_when_bad_rows_are_skipped():
    with pytest.raises(DataError, match="no rows and 1 bad row skipped"):
        load_examples([PAIR | {"rejected": ""}], skip_bad_rows=True)


def test_a_source_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "notes.txt").write_text("hi")
    write(tmp_path, "splits", [PAIR])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"notes\.txt: expected .*\.parquet"):
        load_examples(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"a split out of \['train'\], got 'test'"):
        load_examples(tmp_path / "splits", split="test")
    with pytest.raises(TypeError, match="got int"):
        load_examples(3)


def test_an_error_survives_the_way_between_processes():
    error = DataError("text", "3", "Write text.", field="prompt", file="a.jsonl", row=4)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.row) == (str(error), "prompt", 4)
