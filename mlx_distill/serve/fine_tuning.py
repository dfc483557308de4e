"""Fine-tuning jobs in OpenAI's format."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
