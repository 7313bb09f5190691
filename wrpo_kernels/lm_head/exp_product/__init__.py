"""Log-probs and deltas of a head without a pass over its logits: `form` says how."""

from __future__ import annotations
