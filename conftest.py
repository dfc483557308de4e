"""In every test the calls of the modules whose signatures have shapes (jaxtyping) are checked.

Of no other modules: a checked call takes many times as long, and of plain types mypy is the check. With
``UNCHECKED_SHAPES=1`` nothing is checked (``make test-fast``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).parent


def modules_with_shapes() -> Iterator[str]:
    """The names of the package's modules that import jaxtyping."""
    for path in sorted((ROOT / "mlx_distill").rglob("*.py")):
        if "\nfrom jaxtyping import " in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


if not os.environ.get("UNCHECKED_SHAPES"):
    # Before anything imports them.
    install_import_hook(list(modules_with_shapes()), "helpers.check")
