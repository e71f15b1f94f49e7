"""``python -m rankprune``: the command line, for launchers that want a module."""

from rankprune.cli import main

if __name__ == "__main__":
    main()
