"""Which layout a model and its data get: `choose_layout` weighs the work and asks the model whether it agrees."""

from __future__ import annotations

from .choice import Choice, choose_layout, in_layout

__all__ = ["Choice", "choose_layout", "in_layout"]
