"""The page that compares two models."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
