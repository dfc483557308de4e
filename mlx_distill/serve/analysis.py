"""Answers and labels for rows of a task."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
