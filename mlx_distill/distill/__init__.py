"""Distillation: the teacher's targets, their cache on disk, their alignment with the student's tokens, and
the loss.
"""

from __future__ import annotations
