"""Taking versions out of use, and deleting the files of those that are."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.registry.contents import KEPT
from mlx_distill.registry.records import ARCHIVED, READY, Version
from mlx_distill.registry.versions import INFO_FILE, get_version
from mlx_distill.storage import os_errors, write_json


def archive(ledger: Ledger, model: str, number: int, *, restore: bool = False) -> Version:
    """Take a version out of use; it keeps its number and its files.

    Args:
        ledger: The ledger.
        model: The model's name.
        number: The version's number.
        restore: Take it back into use instead.

    Raises:
        ModelError: no such version, an alias serves it, or it is to be restored and its files were deleted.
    """
    version = get_version(ledger, model, number)
    if restore and version.files_deleted is not None:
        raise ModelError(
            f"{version.name}: its files were deleted",
            fix=f"add them again first: mlx-distill registry add {version.info.get('source') or 'RUN'} "
            f"--name {model}",
        )
    with ledger.write() as db:
        row = db.execute(
            "SELECT alias FROM aliases WHERE model = ? AND version = ?", (model, number)
        ).fetchone()
        if row is not None and not restore:
            raise ModelError(
                f"{model}:{number} is what {row['alias']} serves",
                fix="let it serve another version first: mlx-distill registry promote or rollback",
            )
        old, new = (ARCHIVED, READY) if restore else ("", ARCHIVED)
        db.execute(
            "UPDATE versions SET state = ? WHERE model = ? AND number = ? AND (? = '' OR state = ?)",
            (new, model, number, old, old),
        )
    return get_version(ledger, model, number)


@dataclass(frozen=True)
class Deleted:
    """The files of a version that were deleted.

    Attributes:
        files: How many.
        freed: Bytes of those that nothing else is linked to, such as a run.
    """

    files: int
    freed: int


def delete_files(ledger: Ledger, model: str, number: int) -> Deleted:
    """Archive a version and delete its files. Its number, its facts and the hashes of its files stay, so the
    same content that is added again is the same version. Where it is interrupted, the same call goes on.

    Args:
        ledger: The ledger.
        model: The model's name.
        number: The version's number.

    Raises:
        ModelError: no such version, or an alias serves it.
        FileError: a file cannot be deleted.
    """
    version = archive(ledger, model, number)
    # Said first: from here on nobody may count on the files.
    info = {**version.info, "files_deleted": version.files_deleted or time.time()}
    place = ledger.root.inside(version.kept).parent
    with ledger.write() as db:
        marked = db.execute(
            "UPDATE versions SET info = ? WHERE model = ? AND number = ? AND state = ?",
            (to_json(info), model, number, ARCHIVED),
        ).rowcount
    if not marked:
        raise ModelError(f"{version.name}: somebody has just restored it", fix="see: registry list")
    if place.is_dir():
        write_json(place / INFO_FILE, info)
    return _delete(place / KEPT)


def _delete(kept: Path) -> Deleted:
    with os_errors():
        if not kept.is_dir():
            return Deleted(0, 0)
        found = [path.lstat() for path in kept.rglob("*") if path.is_file()]
        shutil.rmtree(kept)
    return Deleted(len(found), sum(one.st_size for one in found if one.st_nlink == 1))
