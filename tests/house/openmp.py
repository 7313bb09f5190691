"""The OpenMP runtimes in a process, as an expression for a script that has imported `sys`; empty where Linux is not.

Two runtimes mean two pools that fight for the cores: torch's own products then run several times slower.
"""

from __future__ import annotations

RUNTIMES = """sorted({
    line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line
} if sys.platform == "linux" else ())"""
