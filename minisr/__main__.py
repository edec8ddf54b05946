"""python -m minisr"""

import sys

from minisr.cli import main

sys.exit(main())
