"""benchmarks/ is no package: its scripts are run by path, and so find their modules beside them. So do the tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
