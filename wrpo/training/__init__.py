"""The trainers of WRPO and of the SFT before it, their settings, and what they write down."""

from __future__ import annotations
