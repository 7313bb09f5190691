"""How a call reaches a kernel: backends, autograd, launches, and Triton's own."""

from __future__ import annotations
