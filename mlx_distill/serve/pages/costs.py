"""The page of costs."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
