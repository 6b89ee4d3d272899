"""Scores: what each is called, and which direction is better. `evaluation/measures.py` computes them."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "inception"  # the features on which a score goes by its plain name


@dataclass(frozen=True)
class Metric:
    """A score on some features. plain: its name on Inception; elsewhere: after the name of other features."""

    plain: str
    elsewhere: str
    more_is_better: bool = False

    @property
    def better(self) -> str:
        """more or less."""
        return "more" if self.more_is_better else "less"

    def name(self, features: str) -> str:
        """What the score is called on these features: no Frechet distance away from Inception is a FID."""
        return self.plain if features == PLAIN else f"{features} {self.elsewhere}"


METRICS = {
    "fd": Metric("FID", "FD"),
    "sfd": Metric("sFID", "sFD"),
    "is": Metric("IS", "IS", more_is_better=True),
    "kd": Metric("KID", "KD"),
    "precision": Metric("precision", "precision", more_is_better=True),
    "recall": Metric("recall", "recall", more_is_better=True),
    "density": Metric("density", "density", more_is_better=True),
    "coverage": Metric("coverage", "coverage", more_is_better=True),
}
