"""Where the benchmark models and data are, if they are anywhere."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["assets_root"]


def assets_root() -> Path | None:
    """Folder that LCPAQ_ASSETS names, else ``shared/assets`` beside the checkout; None if there is none."""
    named = os.environ.get("LCPAQ_ASSETS")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "assets"
    return root if root.is_dir() else None
