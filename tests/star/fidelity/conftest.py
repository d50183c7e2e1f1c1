"""Lets the tests of this folder, and their workers, use what lies beside the other tests of `star`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
