"""`python -m fxrep` is `fxrep`."""

import sys

from fxrep.cli import main

if __name__ == "__main__":
    sys.exit(main())
