"""`python -m bench.static` runs the gate."""

import sys

from bench.static.gate import main

sys.exit(main())
