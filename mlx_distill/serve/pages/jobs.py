"""The page of jobs."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
