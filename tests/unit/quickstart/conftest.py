"""The quickstart's programs are scripts in a folder, not a package: make them importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
