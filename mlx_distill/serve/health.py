"""Whether the process lives, whether its model answers, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
