"""A curvature matrix whose per-batch products are kept, so that the forward does not run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
