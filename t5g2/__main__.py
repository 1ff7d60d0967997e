"""``python -m t5g2`` is the command ``t5g2``."""

import sys

from t5g2.cli import main

if __name__ == "__main__":  # Worker processes import this module again and must not start the job.
    sys.exit(main())
