"""Tasks: the prompt, the answer's schema, and how an answer is written and read."""

from __future__ import annotations
