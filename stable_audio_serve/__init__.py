"""Self-hosted serving of Stability AI's Stable Audio models on Ray Serve."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
