"""`python -m verst.cli`, where the script is not on the PATH."""

import sys

from verst.cli import main

if __name__ == "__main__":
    sys.exit(main())
