"""The command line. It needs the extra "cli"."""

import signal
import sys
from typing import NoReturn

from rankprune.errors import MissingExtraError, RankPruneError


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line on standard error and exit status 2."""
    try:
        from rankprune.cli.app import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        _end(MissingExtraError(error.name, "cli"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as schedulers end processes: drafts of files are deleted then
    try:
        app()
    except (RankPruneError, OSError) as error:
        _end(error)


def _end(error: Exception) -> NoReturn:
    print("error:", *map(str.strip, str(error).splitlines()), file=sys.stderr)
    sys.exit(2)
