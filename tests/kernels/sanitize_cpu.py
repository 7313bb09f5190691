"""Random calls and op tests on a native module with AddressSanitizer and UBSan, at every instruction set of this CPU.

    LD_PRELOAD="libasan.so libstdc++.so" python tests/kernels/sanitize_cpu.py FOLDER [--seconds 20]  (make sanitize-cpu)

FOLDER holds the wrpo_kernels/_cpu that was built with WRPO_SANITIZE=address,undefined. The first access outside an
allocation, or undefined operation, ends the process with a report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fuzz
import pytest

import wrpo_kernels

TESTS = (
    "test_token_logp.py",
    "test_linear_token_statistics.py",
    "test_token_statistics_kernels.py",
    "test_preference_loss.py",
    "test_native_product.py",
)
# The bounds of these are those of sums in vectors, which a sanitizer leaves element after element.
CHOICE = "(native-cpu or test_native_product) and not errors_are_those_of_the_rounded_logits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="at each instruction set (default: 20)")
    options = parser.parse_args()
    wrpo_kernels.__path__.insert(0, str(options.folder.resolve() / "wrpo_kernels"))
    from wrpo_kernels import _cpu  # the kernels load it at their first call

    if not Path(_cpu.__file__).is_relative_to(options.folder.resolve()):
        raise SystemExit(f"{options.folder} holds no wrpo_kernels/_cpu: got {_cpu.__file__}")
    for level in _cpu.features()["simd_available"]:
        _cpu.set_simd(level)
        print(f"{level}: {fuzz.run(fuzz.seed_of_the_day(), options.seconds):,} random calls", flush=True)
    here = Path(__file__).resolve().parent
    return pytest.main(
        [
            *(str(here / name) for name in TESTS),
            "-k",
            CHOICE,
            "--quiet",
            "--capture=no",
            "-p",
            "no:cacheprovider",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
