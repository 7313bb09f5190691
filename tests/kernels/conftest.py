"""What the tests of the kernels share beside ../conftest.py."""

from __future__ import annotations

import pytest

from wrpo_kernels.dispatch.backends import load_extension


@pytest.fixture(autouse=True)
def chosen_instruction_set():
    """Every test starts and ends at the instruction set that the native module chose."""
    module, _ = load_extension("_cpu")
    chosen = module and module.features()["simd"]
    yield
    if module:
        module.set_simd(chosen)
