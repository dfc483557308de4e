"""The teacher's soft targets on disk: independent of any student, written once, read as often as wanted."""

from __future__ import annotations

from mlx_distill.targets.store import FORMAT, TargetReader, TargetRow, TargetWriter

__all__ = ["FORMAT", "TargetReader", "TargetRow", "TargetWriter"]
