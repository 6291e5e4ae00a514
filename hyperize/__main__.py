"""`python -m hyperize`, the same as the console command."""

import sys

from hyperize.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
