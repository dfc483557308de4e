"""Inference: batched generation, label scoring, strict parsing."""

from __future__ import annotations
