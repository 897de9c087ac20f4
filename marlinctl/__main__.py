"""`python -m marlinctl` is the same program as `marlinctl`."""

import sys

from marlinctl.cli import main

sys.exit(main())
