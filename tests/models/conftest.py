"""Fixtures of all tests of models."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, and thousands of syncs on a busy disk take minutes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
