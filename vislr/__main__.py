"""`python -m vislr` is the `vislr` command."""

import sys

from vislr.cli import main

sys.exit(main())
