"""What several tests share: small models, runs, processes that are killed, and the checker of shapes and
types.
"""

from __future__ import annotations

from helpers.shape_checker import check as check
