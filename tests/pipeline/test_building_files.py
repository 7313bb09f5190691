"""What `wrpo build` writes: whole files or none, the same from any number of machines, in memory that does not grow."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored_answers import answers, many_answers, write_lines

from wrpo import cli
from wrpo.building import BuildFiles, BuildSettings, build, build_rows
from wrpo.building.grouping import PromptGroups
from wrpo.building.writing import Output, _JsonLines
from wrpo.data import load_examples
from wrpo.rows.shards import Shard, place
from wrpo.user_error import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def candidates(tmp_path) -> Path:
    return write_lines(many_answers(80), tmp_path / "candidates.jsonl")


@pytest.fixture
def build_to(tmp_path, candidates, monkeypatch):
    """Build into a folder under tmp_path, without the picture; options of `BuildFiles` and `BuildSettings` by name."""
    monkeypatch.setattr("wrpo.building.pipeline.draw_rewards", lambda report, path: False)

    def run(folder: str, **options):
        own = {name: options.pop(name) for name in list(options) if name in BuildFiles.__dataclass_fields__}
        files = BuildFiles(**{"candidates": [str(candidates)], "output_dir": str(tmp_path / folder)} | own)
        return build(BuildSettings(**options), files)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the files of rows."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".parquet")}


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_both_stages_read_and_prints_the_report(candidates, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["build", str(candidates), "-o", str(out), "--num-sources", "2", "--min-target-gap", "0.25"]) == 0
    built = build_rows(candidates, BuildSettings(num_sources=2, min_target_gap=0.25))
    rejected = [json.loads(row["responses"][-1])["content"] for row in load_examples(out / "triples.jsonl")]
    assert rejected == [row["rejected"] for row in built.triples]
    answers = [json.loads(row["responses"][0])["content"] for row in load_examples(out / "sft.jsonl", stage="sft")]
    assert answers == [row["source_chosen"][0] for row in built.sft]
    shown = capsys.readouterr().out
    assert shown.startswith(str(built.report))
    assert f"triples  {out / 'triples.jsonl'}\n" in shown
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "rewards.png", "sft.jsonl", "triples.jsonl"]
    report = json.loads((out / "report.json").read_text())
    assert (report["triples"], report["won"]) == (len(built.triples), dict(built.report.won))
    assert (report["settings"]["seed"], report["settings"]["min_target_gap"]) == (42, 0.25)


def test_settings_come_from_a_file_and_flags_win(candidates, tmp_path):
    (tmp_path / "build.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsft_share: 1\nseed: 3\n")
    assert cli.main(["build", str(tmp_path / "build.yaml"), str(candidates), "--seed", "5"]) == 0
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert (settings["sft_share"], settings["seed"]) == (1.0, 5)
    assert not (tmp_path / "out" / "triples.jsonl").exists()


def test_several_files_and_forms_of_candidates_are_one_set(candidates, build_to, tmp_path):
    rows = many_answers(80)
    write_lines(rows[:500], tmp_path / "part-0.jsonl")
    pq.write_table(pa.Table.from_pylist(rows[500:]), tmp_path / "part-1.parquet")
    build_to("whole")
    build_to("parts", candidates=[str(tmp_path / "part-1.parquet"), str(tmp_path / "part-0.jsonl")])
    build_to("glob", candidates=[str(tmp_path / "part-*")])
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts") == contents(tmp_path / "glob")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_spread_over_files_load_as_one(form, build_to, tmp_path):
    built = build_rows(many_answers(80), BuildSettings(num_sources=3))
    written = build_to("out", format=form, rows_per_file=10, num_sources=3)
    parts = sorted((tmp_path / "out").glob(f"triples-*.{form}"))
    assert [path.name for path in parts][:2] == [f"triples-00000.{form}", f"triples-00001.{form}"]
    assert len(parts) == -(-len(built.triples) // 10)
    by_list, by_glob = load_examples(parts), load_examples(written.files["triples"])
    assert by_list["row"][:12] == [*range(1, 11), 1, 2]
    expected = load_examples(built.triples)
    for loaded in (by_list, by_glob):
        for column in ("prompt", "responses", "role", "share", "model"):
            assert loaded[column][:] == expected[column][:]
    assert len(load_examples(written.files["sft"], stage="sft")) == len(built.sft)


def test_the_shards_of_several_machines_are_the_whole(build_to, tmp_path):
    build_to("whole")
    for index in (2, 0, 3, 1):
        build_to("shards", shard=f"{index}/4")
    for kind in ("sft", "triples"):
        parts = sorted((tmp_path / "shards").glob(f"{kind}-*.jsonl"))
        assert [path.name for path in parts] == [f"{kind}-{index:05d}-of-00004.jsonl" for index in range(4)]
        assert b"".join(path.read_bytes() for path in parts) == (tmp_path / "whole" / f"{kind}.jsonl").read_bytes()
    assert len(list((tmp_path / "shards").glob("report-*.json"))) == 4


def test_a_shard_is_asked_for_without_anything_heavy():
    code = (
        "import sys; from wrpo.rows.shards import in_shard; print(in_shard('0/2')('a') != in_shard('1/2')('a'), "
        "[name for name in ('torch', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "True []\n"


def test_a_shard_without_a_prompt_is_no_error(build_to, candidates, tmp_path):
    write_lines(answers("a", big=[0.9], target=[0.1, 0.2]), candidates)
    rows = [build_to("out", shard=f"{index}/3").report.candidates for index in range(3)]
    assert sorted(rows) == [0, 0, 3]


def test_an_earlier_build_is_replaced_only_when_asked(build_to, tmp_path):
    build_to("out", rows_per_file=5)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"output_dir: .* holds .* of an earlier build"):
        build_to("out")
    with pytest.raises(UserError, match="earlier build"):
        build_to("out", shard="0/2")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "triples_of_mine.jsonl").write_text("{}")
    build_to("out", overwrite=True)
    assert sorted(contents(tmp_path / "out")) == ["sft.jsonl", "triples.jsonl", "triples_of_mine.jsonl"]


def test_a_full_disk_leaves_the_earlier_files_and_no_half_one(build_to, tmp_path, monkeypatch):
    build_to("out")
    before = contents(tmp_path / "out")
    write, room = _JsonLines.write, iter(range(30))

    def write_until_full(self, row):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, row)

    monkeypatch.setattr(_JsonLines, "write", write_until_full)
    with pytest.raises(UserError, match=r"No space left on device.*output_dir and temp_dir"):
        build_to("out", overwrite=True, seed=1)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_killed_build_leaves_no_file_under_its_name_and_the_next_one_clears_up(build_to, candidates, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from wrpo.building import BuildFiles, BuildSettings, build, pipeline\n"
        "pipeline.draw_rewards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build(BuildSettings(), BuildFiles([sys.argv[1]], sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(candidates), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["unfinished", "unfinished.lock"]
    build_to("out")
    assert not (tmp_path / "out" / "unfinished.lock").exists()
    assert not (tmp_path / "out" / "unfinished").exists()
    assert set(contents(tmp_path / "out")) == {"sft.jsonl", "triples.jsonl"}


def output_to(folder: Path, shard: str | None = None, overwrite: bool = False) -> Output:
    return Output(folder, "jsonl", None, Shard.parse(shard), overwrite)


def test_two_builds_of_one_folder_cannot_run_at_once_and_two_shards_can(build_to, tmp_path):
    with output_to(tmp_path / "out", "0/2") as first:
        with pytest.raises(UserError, match="another build is writing"):
            build_to("out", shard="0/2", overwrite=True)
        build_to("out", shard="1/2")
        first.write("prompts", {"prompt_id": "a", "prompt": "hi"})
    assert (tmp_path / "out" / "prompts-00000-of-00002.jsonl").read_text().count("\n") == 1
    assert not list((tmp_path / "out").glob("unfinished*"))


def test_what_another_build_finished_in_the_meantime_is_kept(build_to, tmp_path):
    late = output_to(tmp_path / "out", "0/2").__enter__()
    late.write("prompts", {"prompt_id": "a", "prompt": "hi"})
    build_to("out")
    with pytest.raises(UserError, match="earlier build"):
        late.__exit__(None, None, None)
    assert sorted(contents(tmp_path / "out")) == ["sft.jsonl", "triples.jsonl"]


def test_a_set_that_is_being_replaced_has_no_report(build_to, tmp_path, monkeypatch):
    build_to("out")
    unlink, removed = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **own: (removed.append(path.name), unlink(path, **own)))
    build_to("out", overwrite=True)
    assert removed[0] == "report.json"


# -- grouping and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition_bytes", [1, 500, 1 << 20])
def test_rows_come_grouped_by_prompt_in_the_order_of_the_hash_whatever_the_partitions(partition_bytes, tmp_path):
    rng = random.Random(0)
    ids = [f"p{number}" for number in range(300)]
    records = [(place(name, 42)[0], name, n) for name in ids for n in range(rng.randrange(1, 6))]
    shuffled = rng.sample(records, len(records))
    with PromptGroups(tmp_path, partition_bytes) as groups:
        for record in shuffled:
            groups.add(record)
        grouped = list(groups)
    assert [group[0][1] for group in grouped] == sorted(ids, key=lambda name: place(name, 42)[0])
    assert sorted(record for group in grouped for record in group) == sorted(records)
    assert all(len({record[1] for record in group}) == 1 for group in grouped)
    assert list(tmp_path.iterdir()) == [], "temporary files have no name that a killed process could leave"


def test_two_ids_with_one_hash_stay_two_prompts():
    with PromptGroups(partition_bytes=1) as groups:
        for name in "abab":
            groups.add((7, name))
        assert list(groups) == [[(7, "a"), (7, "a")], [(7, "b"), (7, "b")]]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_candidates(tmp_path):
    code = (
        "import json, resource, sys\n"
        "from benchmarks.build import write_candidates\n"
        "from wrpo.building import BuildFiles, BuildSettings, build\n"
        "peaks = []\n"
        "for prompts in (2_000, 8_000):\n"
        "    path = f'{sys.argv[1]}/{prompts}.jsonl'\n"
        "    write_candidates(prompts, 10, path)\n"
        "    files = BuildFiles([path], f'{sys.argv[1]}/out{prompts}')\n"
        "    report = build(BuildSettings(), files, partition_bytes=1 << 17).report\n"
        "    assert report.candidates == 10 * prompts\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
        "print(json.dumps(peaks))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    few, many = json.loads(shown.splitlines()[-1])
    # As objects 60,000 rows more are about 40 MB; what may grow is the sample of the picture, 20,000 x 4 floats.
    assert many - few < 20, f"peak {few:.0f} MiB with 20,000 rows, {many:.0f} MiB with 80,000"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
