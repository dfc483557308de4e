"""In every test the calls of the functions whose signatures have arrays are checked, in the modules that have
shapes (jaxtyping).

Of no others: a checked call takes many times as long, and of plain types mypy is the check. With
``UNCHECKED_SHAPES=1`` nothing is checked (``make test-fast``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from helpers.shape_checker import install

ROOT = Path(__file__).parent


def modules_with_shapes() -> Iterator[str]:
    """The names of the package's modules that import jaxtyping."""
    for path in sorted((ROOT / "mlx_distill").rglob("*.py")):
        if "\nfrom jaxtyping import " in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


if not os.environ.get("UNCHECKED_SHAPES"):
    # Before anything imports them.
    install(modules_with_shapes())
