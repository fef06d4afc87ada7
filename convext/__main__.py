"""`python -m convext`: the command line; without arguments, the doctor's report."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:] or ["doctor"]))
