"""Checkpoints as streams: read a header, plan every tensor, transform and write it in slabs of rows."""

from __future__ import annotations
