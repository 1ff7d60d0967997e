"""The corpus builders are scripts that stand beside the package; their tests import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "corpora"))
