"""Tasks: the prompt, the answer's schema, and how an answer is written and parsed."""

from __future__ import annotations
