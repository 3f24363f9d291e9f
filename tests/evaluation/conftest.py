"""The scripted endpoint for benchmarks, and the helpers beside the tests, imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

from scripted_endpoint import serve

sys.path.insert(0, str(Path(__file__).resolve().parent))

__all__ = ["serve"]
