"""Files that are written whole or not at all, into folders that are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from rankprune.errors import RankPruneError


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Give the name of a draft beside `path`, which takes its place when all is written; one of what failed is deleted.

    Whoever reads `path` finds the old file or the new one, and of several processes that write it the last one's stays.
    """
    draft = path.with_name(f"{path.name}.{uuid4().hex}.part")  # processes in containers have equal numbers
    try:
        yield draft
        os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Make sure that a file can be written there.

    Raises:
        RankPruneError: if there is no such folder.
    """
    if not path.parent.is_dir():
        raise RankPruneError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
