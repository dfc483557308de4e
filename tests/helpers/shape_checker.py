"""The type checker of the tests: beartype, with PEP 484's numeric tower (an int is accepted as a float)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
