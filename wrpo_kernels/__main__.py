"""python -m wrpo_kernels: what would run here, and why not the others; text that a bug report can paste."""

from __future__ import annotations

import sys

from wrpo_kernels.environment import report


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"python -m wrpo_kernels takes no arguments but --help, got {' '.join(arguments)!r}", file=sys.stderr)
        raise SystemExit(2)
    print(__doc__ if arguments else report())


if __name__ == "__main__":
    main()
