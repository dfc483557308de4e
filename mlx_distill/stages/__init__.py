"""The stages of a run: functions that read the folders of their parents and write into a folder of their own.

A stage knows nothing of keys or of skipping: :mod:`mlx_distill.pipeline` gives it a partial folder, empty or
as a killed run left it, and publishes that folder when the stage returns. The facts that a stage returns are
recorded in its manifest, for people.
"""

from __future__ import annotations
