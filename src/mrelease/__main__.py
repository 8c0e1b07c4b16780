"""Run the command as `python -m mrelease`."""

from __future__ import annotations

import sys

from mrelease.cli import main

if __name__ == "__main__":
    sys.exit(main())
