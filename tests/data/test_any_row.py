"""Whatever stands in rows, files and tables: an example, or an error that is ours and says what to do.

WRPO_FUZZ=20000 pytest tests/data/test_any_row.py draws so many cases of each kind, other ones in each run.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, HEADERS, MERGED_SYSTEM, tiny_tokenizer

from wrpo.building import BuildSettings, build_rows
from wrpo.data import load_examples, tokenize_examples
from wrpo.data.left_out import dense
from wrpo.data.rendering import Renderer
from wrpo.rows.errors import DataError
from wrpo.rows.json_lines import json_line
from wrpo.rows.messages import asked
from wrpo.rows.reading import read_rows
from wrpo.sampling.prompts import Prompts
from wrpo.sampling.served_messages import served_messages
from wrpo.scoring.candidates import Candidates
from wrpo.user_error import UserError

CASES = int(os.environ.get("WRPO_FUZZ", "0"))


def drawn(share: float = 1.0):
    """Some cases, the same in every run; with WRPO_FUZZ so many, and a failure prints how to have it again."""
    return settings(
        max_examples=max(1, int(share * (CASES or 60))),
        derandomize=not CASES,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def error_of(read: Callable[[], object]) -> str | None:
    """The words of our own error; any other is the test's."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


# -- rows -------------------------------------------------------------------------------------------------------------

ODD_TEXT = [
    "",
    " \n",
    "five",
    "2 + 3?",
    "<|im_end|>",
    "<think>a</think>b",
    "\ud800",
    "\x00",
    "﻿",
    "[]",
    "{}",
    "null",
    "a" * 999,
]
texts = (
    st.sampled_from(ODD_TEXT) | st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Zs", "Cc"]), max_size=3)
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1, True])
scalars = st.none() | texts | numbers
FIELDS = (
    "prompt chosen rejected source_chosen target_chosen responses role share model reward messages conversations "
    "instruction input output history system completion response reference rejected_response rejected_messages "
    "all_generated_responses all_rm_scores completions rank response1 response2 overall_preference context tools "
    "chat_template_kwargs source_weight source_model source_reward ref_logp source_logp score_chosen images "
    "prompt_id sample content from value name tool_calls function arguments reasoning_content"
).split()
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "source", "target", "rejected"]) | texts
calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": anything})}) | anything,
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": roles, "content": texts | anything}, optional={"tool_calls": calls | anything, "name": anything}
)
turns = st.lists(messages, max_size=3) | messages | st.fixed_dictionaries({"from": roles, "value": texts})
said = texts | turns | st.lists(texts | turns, max_size=3)
as_json = st.builds(lambda value: json.dumps(value, default=str), turns)
rows = st.dictionaries(st.sampled_from(FIELDS), said | as_json | anything, max_size=7)
pairs = st.fixed_dictionaries(
    {"prompt": said | as_json, "chosen": said, "rejected": said},
    optional=dict.fromkeys(("system", "tools", "chat_template_kwargs", "reference", "ref_logp"), anything),
)
candidates = st.fixed_dictionaries(
    {"prompt_id": texts, "prompt": said, "model": texts, "response": texts, "reward": numbers, "sample": numbers},
    optional=dict.fromkeys(("system", "tools", "chat_template_kwargs"), anything),
)
TOKENIZERS = [tiny_tokenizer(template) for template in (CHATML, HEADERS, MERGED_SYSTEM)]


@drawn(3)
@given(row=rows | pairs, stage=st.sampled_from(["preference", "sft"]), from_scores=st.booleans())
def test_any_row_is_an_example_or_an_error_of_its_own(row, stage, from_scores):
    try:
        (example,) = load_examples([row], stage=stage, from_scores=from_scores)
    except DataError:
        return
    assert len(example["responses"]) == len(example["role"]) == len(example["share"])
    assert load_examples([example], stage=stage)["responses"][0] == example["responses"]


@drawn(2)
@given(row=pairs, tokenizer=st.sampled_from(TOKENIZERS))
def test_every_example_is_rendered_whole_or_refused(row, tokenizer):
    try:
        (example,) = load_examples([row])
        responses = {str(k): json.loads(response) for k, response in enumerate(example["responses"])}
        tools, options = (json.loads(example[name] or "null") for name in ("tools", "chat_template_kwargs"))
        text, whole, _ = Renderer(tokenizer)(
            json.loads(example["prompt"]), responses, tools=tools, chat_template_kwargs=options
        )
    except DataError:
        return
    for message in json.loads(example["prompt"]):
        assert dense(message.get("content") or "") in dense(text)
    for name, response in responses.items():
        assert whole[name].startswith(text)
        assert dense(response.get("content") or "").partition("<|im_end|>")[0] in dense(whole[name])


@drawn(0.4)
@given(table=st.lists(pairs, max_size=5), tokenizer=st.sampled_from(TOKENIZERS))
def test_any_rows_are_tokens_or_counted(table, tokenizer):
    datasets.disable_caching()
    try:
        tokens = tokenize_examples(load_examples(table, skip_bad_rows=True), tokenizer, skip_bad_rows=True)
    except DataError:
        return
    finally:
        datasets.enable_caching()
    assert all(ids for row in tokens for ids in row["response_ids"])


@drawn()
@given(table=st.lists(candidates | rows, max_size=6), stage=st.sampled_from(["all", "sft"]))
def test_any_candidates_are_built_or_refused(table, stage):
    for skip_bad_rows in (False, True):
        settings_of_build = BuildSettings(skip_bad_rows=skip_bad_rows, stage=stage, ties="source")
        error_of(lambda how=settings_of_build: build_rows(table, how))


@drawn()
@given(row=candidates | rows)
def test_what_any_row_asks_can_be_sent_and_written(row):
    try:
        question = asked(row)
    except DataError:
        return
    json.dumps([served_messages(question.messages), question.beside]).encode()
    assert asked(json.loads(json_line({"prompt": question.prompt, **question.beside}))) == question


@drawn(0.5)
@given(table=st.lists(candidates | rows, max_size=4))
def test_any_file_of_prompts_or_candidates_is_read_or_refused(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"".join(map(json_line, table)))
    for skip in (False, True):
        error_of(lambda skip=skip: list(Prompts([str(path)], skip_bad_rows=skip)))
        error_of(lambda skip=skip: list(Candidates([str(path)], "out.jsonl", skip_bad_rows=skip)))


# -- files ------------------------------------------------------------------------------------------------------------

PAIR = json.dumps({"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}).encode()
pieces = st.sampled_from(
    [PAIR, b"\n", b"[", b"]", b",", b"{", b'"', b"\xff", b"\xef\xbb\xbf", b"\x00", b"1e999", b"NaN"]
)
broken = st.lists(pieces | st.binary(max_size=6), max_size=8).map(b"".join)


@drawn()
@given(content=broken | st.binary(max_size=80), packed=st.sampled_from(["", "whole", "cut"]))
def test_any_bytes_are_rows_or_errors_with_their_place(content, packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / ("rows.jsonl.gz" if packed else "rows.jsonl")
    content = gzip.compress(content)[: -5 if packed == "cut" else None] if packed else content
    path.write_bytes(content)

    def read() -> None:
        for file, number, row in read_rows(path):
            assert (file, number > 0) == (str(path), True)
            assert isinstance(row, dict) or str(path) in str(row)

    assert str(path) in (error_of(read) or str(path))


cells = {
    pa.string(): st.text(max_size=8),
    pa.large_string(): st.sampled_from(["five", "", " "]),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=4),
    pa.date32(): st.dates(min_value=date(1900, 1, 1)),
    pa.timestamp("us"): st.integers(-(2**63), 2**63 - 1) | st.datetimes(min_value=datetime(1900, 1, 1)),
    pa.timestamp("ns", "UTC"): st.integers(-(2**63), 2**63 - 1),
    pa.duration("ns"): st.integers(-(2**63), 2**63 - 1),
    pa.decimal128(8, 2): st.decimals(-1000, 1000, places=2).map(Decimal),
    pa.null(): st.none(),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["five", "5"]),
}
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string()), ("n", pa.int32())])
message_cells = st.fixed_dictionaries(
    {"role": roles.filter(lambda text: text.isprintable()), "content": st.text(max_size=5) | st.none()},
    optional={"tool_calls": st.sampled_from(["[]", "[{", '[{"name": "add"}]', None]), "n": st.none() | st.just(3)},
)
cells |= {
    MESSAGE: message_cells,
    pa.list_(MESSAGE): st.lists(message_cells | st.none(), max_size=3),
    pa.list_(pa.string()): st.lists(st.text(max_size=4) | st.none(), max_size=3),
    pa.list_(pa.list_(pa.float64())): st.lists(st.lists(st.floats(), max_size=2), max_size=3),
    pa.map_(pa.string(), pa.string()): st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=2),
}


@st.composite
def tables(draw) -> pa.Table:
    names = draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=6))
    for form in draw(
        st.sampled_from([[], ["prompt", "chosen", "rejected"], ["prompt", "model", "response", "reward"]])
    ):
        names += [form] if form not in names else []
    count = draw(st.integers(0, 3))
    columns = {}
    for name in names:
        kind = draw(st.sampled_from(list(cells)))
        columns[name] = pa.array(draw(st.lists(cells[kind] | st.none(), min_size=count, max_size=count)), kind)
    return pa.table(columns)


@drawn()
@given(table=tables(), stage=st.sampled_from(["preference", "sft"]))
def test_any_table_is_examples_or_errors(table, stage, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "rows.parquet"
    pq.write_table(table, path)
    for load in (
        lambda: load_examples(path, stage=stage, skip_bad_rows=True),
        lambda: load_examples(path, stage=stage),
        lambda: build_rows(path, BuildSettings(skip_bad_rows=True)),
        lambda: Prompts([str(path)], skip_bad_rows=True),
    ):
        assert "\n" not in (error_of(load) or "")


@drawn()
@given(data=st.data())
def test_a_table_with_broken_bytes_is_rows_or_an_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["2 + 3?"] * 9, "chosen": ["5"] * 9, "rejected": ["6"] * 9}), path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(4, len(content) - 1), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    words = error_of(lambda: load_examples(path, skip_bad_rows=True))
    assert words is None or str(path) in words
