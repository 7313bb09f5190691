"""Whatever stands in a YAML file or behind a command's name: settings, or one line that says what to put right.

WRPO_FUZZ=20000 pytest tests/house/test_any_settings.py draws so many cases of each kind, other ones in each run.
"""

from __future__ import annotations

import dataclasses
import os

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrpo import SFTConfig, WRPOConfig
from wrpo.building.settings import BuildFiles, BuildSettings
from wrpo.evaluation.settings import EvalSettings, TriplesSettings
from wrpo.reference.command import LogpSettings
from wrpo.sampling.settings import SampleSettings, Sampling
from wrpo.sampling.sources import KINDS, read_sources
from wrpo.scoring.judge import JudgeSource, read_judge
from wrpo.scoring.settings import RewardModelSettings, ScorerSettings, ScoreSettings
from wrpo.settings import DataSettings, ModelSettings
from wrpo.settings.command_line import parse_settings
from wrpo.user_error import UserError

CASES = int(os.environ.get("WRPO_FUZZ", "0"))
COMMANDS: list[tuple[type, ...]] = [
    (BuildFiles, BuildSettings), (SampleSettings, Sampling), (ScoreSettings, ScorerSettings, RewardModelSettings),
    (EvalSettings, ScorerSettings, TriplesSettings), (LogpSettings,), (ModelSettings, DataSettings),
]  # fmt: skip
TRAINING: list[tuple[type, ...]] = [(ModelSettings, DataSettings, WRPOConfig), (ModelSettings, DataSettings, SFTConfig)]
SOURCES = (*KINDS.values(), JudgeSource)
FIELDS = sorted({field.name for cls in {*SOURCES, *sum(COMMANDS, ())} for field in dataclasses.fields(cls)})


def drawn(cases: int):
    """Some cases, the same in every run; with WRPO_FUZZ so many, and a failure prints how to have it again."""
    return settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


words = st.sampled_from([
    "none", "null", "true", "auto", "a.yaml", "0/4", "{a: 1}", "http://a/v1", "http://[/", "http://a:99999", "server",
    "1e999", "vllm", "transformers", "jsonl", "2026-01-01", "0x_", "1_0", ".inf", "-.nan", "!!float x", "&a", "*a",
    "!!python/name:os", "<<", "\ud800", "\x00", "-", "--", "--=", "-o", "(", "[(]", "{prompt}{response}",
])  # fmt: skip
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 10**400, True])
values = st.recursive(
    st.none() | words | numbers | st.text(max_size=6) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers() | st.none(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*FIELDS, "kind"]) | words | st.none() | st.integers()
mappings = st.dictionaries(names, values, max_size=5)
entries = st.builds(
    lambda fields, kind: {"model": "m", "base_url": "http://a/v1", **fields, **({"kind": kind} if kind else {})},
    mappings,
    st.sampled_from([*KINDS, None]),
)


def written(value: object) -> str:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace").decode()


pieces = st.sampled_from(
    ["- ", ": ", "\n", "  ", "{", "}", "[", "]", "#", "|", ">", "'", '"', "? ", "!!", "%", "---", "\t"]
)
as_text = st.lists(pieces | words | st.sampled_from(FIELDS) | st.text(max_size=3), max_size=14).map("".join)
files = (mappings | st.lists(entries | values, max_size=3) | entries | values).map(written) | as_text


def one_line_or_nothing(read) -> None:
    """Nothing but our own error may come, and it is one line for the terminal."""
    words_of_error = None
    try:
        read()
    except UserError as error:
        words_of_error = str(error)
    assert words_of_error is None or len(words_of_error.strip().splitlines()) == 1


@drawn(150)
@given(content=files | st.binary(max_size=20))
def test_any_file_of_sources_or_judge_is_read_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "sources.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    one_line_or_nothing(lambda: read_sources(path))
    one_line_or_nothing(lambda: read_judge(path))


@drawn(100)
@given(content=files, classes=st.sampled_from(COMMANDS))
def test_any_settings_file_is_read_or_refused(content, classes, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "settings.yaml"
    path.write_text(content, "utf-8", "replace")
    one_line_or_nothing(lambda: parse_settings(classes, [str(path)], "wrpo"))


flags = st.builds(
    lambda dashes, name, equals, value: [f"{dashes}{name}={value}"] if equals else [f"{dashes}{name}", str(value)],
    st.sampled_from(["--", "-", ""]), st.sampled_from(FIELDS) | words, st.booleans(), words | numbers,
)  # fmt: skip


@drawn(100)
@given(arguments=st.lists(flags, max_size=5), classes=st.sampled_from(COMMANDS))
def test_any_words_behind_a_command_are_settings_or_refused(arguments, classes):
    given_words = [word for flag in arguments for word in flag if word not in ("-h", "--help") and "yaml" not in word]
    one_line_or_nothing(lambda: parse_settings(classes, given_words, "wrpo"))


@drawn(15)
@given(content=mappings, classes=st.sampled_from(TRAINING))
def test_any_settings_of_training_are_read_or_refused(content, classes, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "training.yaml"
    path.write_text(written({"output_dir": "out", **content}), "utf-8")
    one_line_or_nothing(lambda: parse_settings(classes, [str(path)], "wrpo"))
