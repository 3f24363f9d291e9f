"""`python -m her_nemo <stage> ...`, and what `torchrun -m her_nemo` runs in each process."""

from __future__ import annotations

import sys

from her_nemo.cli import main

# Saving a distributed checkpoint spawns a process that imports this module again: without the guard it would hang.
if __name__ == "__main__":
    sys.exit(main())
