"""The page of models, versions and deployments."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
