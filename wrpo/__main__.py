"""python -m wrpo: the same as the command `wrpo`."""

from __future__ import annotations

import sys

from wrpo.cli import main

sys.exit(main())
