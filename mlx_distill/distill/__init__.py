"""Distillation: the teacher scored once, its targets on disk, aligned with the student's tokens, and the
loss.
"""

from __future__ import annotations
