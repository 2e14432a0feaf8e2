"""`python -m bench.static`: the gate."""

import sys

from bench.static.gate import main

sys.exit(main())
