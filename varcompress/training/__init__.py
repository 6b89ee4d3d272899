"""From a pretrained model and a recipe to one elastic checkpoint."""

from varcompress.training.loop import distill

__all__ = ["distill"]
