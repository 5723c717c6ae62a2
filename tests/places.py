"""Where the tests find what they read, and the paths on which their processes find each other's modules."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Data sets that are not in the project; tests of them are skipped where there are none.
DATA = Path(os.environ.get("LENVM_RL_DATA", ROOT.parent / "shared" / "data"))
# The project, and every folder of tests: their names are all different, so any test may import from any other.
PATHS = [str(path) for path in (ROOT, TESTS, *sorted(TESTS.iterdir())) if path.is_dir() and "__" not in path.name]
