"""`wrpo sample` again on a file that is there: nothing is asked twice, and nobody's text is touched."""

from __future__ import annotations

import os

import pytest
from sampled import keys
from scripted_server import serving

from wrpo.rows.appending import AppendedRows

pytest_plugins = ("sampling_fixtures",)  # its fixtures


def test_a_second_run_asks_nothing_twice_and_more_samples_only_the_new_ones(sample, written):
    with serving() as server:
        source = {"model": "a", "base_url": server.url}
        for samples, asked in ((2, 4), (2, 4), (3, 6)):
            assert sample([source], ["p", "q"], "--samples", str(samples)) == 0
            assert len(server.bodies) == asked
        assert sample([source, {"model": "b", "base_url": server.url}], ["p", "q"], "--samples", "3") == 0
        assert len(server.bodies) == 12
    assert keys(written()) == [(p, m, n) for p in "pq" for m in "ab" for n in range(3)]


def test_ctrl_c_is_one_line_and_status_130_and_keeps_what_was_answered(sample, written, monkeypatch, capsys):
    append = AppendedRows.append

    def interrupted(self, row):
        if row["sample"] == 3:
            raise KeyboardInterrupt
        append(self, row)

    with serving() as server:
        source = {"model": "a", "base_url": server.url, "concurrency": 1}
        monkeypatch.setattr(AppendedRows, "append", interrupted)
        assert sample([source], ["p"]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "wrpo sample: stopped"
        assert keys(written()) == [("p", "a", n) for n in range(3)]
        monkeypatch.undo()
        assert sample([source], ["p"]) == 0
    assert keys(written()) == [("p", "a", n) for n in range(5)]


@pytest.mark.parametrize("left", [1, 5, 30, -2, -1])
def test_a_torn_last_line_is_cut_off_and_asked_again(left, sample, written, tmp_path, caplog):
    path = tmp_path / "out.jsonl"
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 3, "concurrency": 1}
        sample([source], ["p"])
        first, second, third = path.read_text().splitlines(keepends=True)
        path.write_text(first + second + third[:left])
        assert sample([source], ["p"]) == 0
        # Without its line end alone the last row is whole.
        assert len(server.bodies) == (3 if left == -1 else 4)
    assert keys(written()) == [("p", "a", 0), ("p", "a", 1), ("p", "a", 2)]


@pytest.mark.parametrize("content", ["a shopping list", '{"prompt": "p"}\n', '{"prompt_id": "p"\n', "[1]\n", "\0\0\0"])
def test_a_file_of_something_else_is_refused_and_left_alone(content, sample, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text(content)
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1"}], ["p"]) == 2
    assert (tmp_path / "out.jsonl").read_text() == content
    assert "out.jsonl, row 1" in capsys.readouterr().err


def test_an_output_that_another_process_writes_is_refused(sample, tmp_path, capsys):
    with serving() as server, AppendedRows(tmp_path / "out.jsonl"):
        assert sample([{"model": "a", "base_url": server.url}], ["p"]) == 2
        assert not server.bodies
    assert "another process is writing it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a pipe", "a link to a device"])
def test_an_output_that_is_no_file_is_refused_before_it_is_opened(kind, sample, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/full")
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1"}], ["p"]) == 2
    assert "out.jsonl: expected a regular file, got a pipe, socket or device" in capsys.readouterr().err


def test_answers_drawn_in_two_ways_do_not_share_a_file(sample, capsys):
    with serving() as server:
        source = {"model": "a", "base_url": server.url}
        assert sample([source], ["p"]) == 0
        assert sample([source], ["p", "q"], "--temperature", "1.0") == 2
        assert len(server.bodies) == 5
    assert "drawn with 1, as now, got 0.8" in capsys.readouterr().err


def test_a_prompt_that_has_changed_under_its_id_is_refused(sample, capsys):
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        assert sample([source], [{"prompt_id": "x", "prompt": "old"}]) == 0
        assert sample([source], [{"prompt_id": "x", "prompt": [{"role": "user", "content": "old"}]}]) == 0
        assert sample([source], [{"prompt_id": "x", "prompt": "new"}]) == 2
        assert len(server.bodies) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "out.jsonl, row 1, field 'prompt': expected the prompt that is now 'x', got 'old'" in shown


def test_a_full_disk_is_one_line_and_loses_no_answer(sample, tmp_path, written, monkeypatch, capsys):
    write, lines = os.write, []

    def full(file, data):
        if data.startswith(b'{"prompt_id"'):
            lines.append(data)
            if len(lines) == 3:
                write(file, data[:20])  # the part that still fitted
                raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("wrpo.rows.appending.os.write", full)
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "concurrency": 2}
        assert sample([source], ["p"]) == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        monkeypatch.undo()
        assert sample([source], ["p"]) == 0
    assert keys(written()) == [("p", "a", n) for n in range(5)]
