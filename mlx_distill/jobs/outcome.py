"""What a succeeded job leaves in the ledger besides its end."""

from __future__ import annotations

from typing import Any

from mlx_distill.jobs.store import Job
from mlx_distill.ledger.database import Ledger


def keep_result(ledger: Ledger, job: Job, value: Any) -> dict[str, Any]:
    """What the job has made, for its row."""
    return {"path": job.run_path} if job.run_path else {}
