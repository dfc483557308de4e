"""Deployments, comparisons and exports of data sets as JSON."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
