"""`python -m rosd_fast` is `rosd-fast`."""

import sys

from rosd_fast.cli import main

sys.exit(main())
