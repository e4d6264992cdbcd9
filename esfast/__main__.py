"""`python -m esfast` is `esfast`."""

import sys

from esfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
