"""The page of data sets."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
