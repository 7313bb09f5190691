"""Rows appended to a file: what a full disk, a kill or a file system without locks leaves."""

from __future__ import annotations

import os

import pytest

from wrpo.rows.appending import AppendedRows
from wrpo.user_error import UserError


def test_a_file_system_without_locks_is_one_line_and_the_file_is_closed(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("wrpo.rows.appending.fcntl.flock", no_locks)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match="its file system has no locks: Operation not supported"):
        AppendedRows(tmp_path / "out.jsonl")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_last_line_of_brackets_in_brackets_is_torn_and_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"prompt_id": ' + "[" * 200_000)
    with AppendedRows(path):
        assert path.read_text() == ""


def test_a_row_that_did_not_fit_leaves_nothing_for_the_next_to_stand_behind(tmp_path, monkeypatch):
    write = os.write

    def full(file, data):
        if b"long" in data:
            write(file, data[:20])
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("wrpo.rows.appending.os.write", full)
    with AppendedRows(tmp_path / "out.jsonl") as rows:
        rows.append({"prompt_id": "a"})
        with pytest.raises(UserError, match="No space left on device"):
            rows.append({"prompt_id": "b", "response": "long"})
        rows.append({"prompt_id": "c"})
        assert [row for _, row in rows] == [{"prompt_id": "a"}, {"prompt_id": "c"}]
