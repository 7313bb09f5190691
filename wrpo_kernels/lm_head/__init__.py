"""What the ops from hidden states stand on: the head over chunks of rows, its products and its gradients."""

from __future__ import annotations
