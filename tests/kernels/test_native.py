"""The rest of the native module: transposes, and what it says of itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from native_rows import Guarded, _cpu, each_level


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (31, 33), (64, 64), (257, 129), (300, 1100)])
def test_a_transpose_moves_every_element_and_nothing_else(rows, columns, itemsize):
    dtype = {2: torch.int16, 4: torch.int32}[itemsize]
    source = Guarded(torch.randint(-(1 << 15), 1 << 15, (rows, columns)).to(dtype)).rows
    for _, threads in itertools.product(each_level(), (1, 3)):
        out = Guarded(torch.zeros(columns, rows, dtype=dtype))
        front = (source.data_ptr(), itemsize, rows, columns, source.stride(0))
        _cpu.transpose(*front, out.rows.data_ptr(), out.rows.stride(0), threads)
        assert torch.equal(out.rows, source.t())
        out.assert_untouched_around()


def test_an_empty_transpose_needs_no_pointer():
    _cpu.transpose(0, 2, 0, 5, 5, 0, 0, 1)
    _cpu.transpose(0, 2, 5, 0, 0, 0, 5, 1)


def test_a_transpose_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="itemsize: expected 2 or 4, got 8"):
        _cpu.transpose(1, 8, 1, 1, 1, 1, 1, 1)


def test_features_say_what_the_machine_and_the_build_have():
    features = _cpu.features()
    assert features["simd"] == features["simd_available"][-1]  # the widest, unless told otherwise
    assert features["simd_available"][0] == "generic"
    assert isinstance(features["amx_bf16"], bool)
    assert features["threads_runtime"] in ("openmp", "none")
    assert features["compiler"]


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"generic.*got avx1024"):
        _cpu.set_simd("avx1024")
