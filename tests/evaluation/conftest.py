"""The scripted endpoint for benchmarks."""

from __future__ import annotations

from scripted_endpoint import serve

__all__ = ["serve"]
