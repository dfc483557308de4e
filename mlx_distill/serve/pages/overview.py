"""The page of what serves, what runs and how much there is."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
