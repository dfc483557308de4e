"""How results are written as JSON."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class PlainJSON(JSONResponse):
    """JSON of any strings: half surrogate pairs, which a request may hold, are written as escapes."""

    def render(self, content: Any) -> bytes:
        """The body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")
