"""Proof: metrics of any number of models on the same rows, and what can be concluded from them.

The modules here read predictions, never models: nothing imports mlx when it is imported, so that two files of
predictions can be compared without loading it.
"""

from __future__ import annotations
