"""The stages: each reads its parents' folders, does one thing, and leaves its result in the folder that it is
given.

A stage knows nothing of keys, skipping or renaming: :mod:`mlx_distill.pipeline` hands it a partial folder,
empty or as a killed run left it, and publishes that folder when the stage returns. What a stage returns is
recorded in its manifest, for people.
"""

from __future__ import annotations
