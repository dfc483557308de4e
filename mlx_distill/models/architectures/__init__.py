"""One module per model family: how its checkpoint maps to mlx-lm's module tree."""

from __future__ import annotations
