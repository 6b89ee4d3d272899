"""What depth is worth at each scale, and the schedule that spends it best: before any training."""

from varcompress.depth.search import search
from varcompress.depth.sensitivity import sensitivity

__all__ = ["search", "sensitivity"]
