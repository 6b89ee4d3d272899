"""Scores of generated images: features, the reference they are compared with, and torch-fidelity's metrics."""

from varcompress.evaluation.scores import evaluate

__all__ = ["evaluate"]
