"""``python -m shiftkern``."""

import sys

from shiftkern.cli import main

sys.exit(main())
