"""The model card."""

from __future__ import annotations

from varcompress.models.elastic import ElasticVAR


def model_card(model: ElasticVAR, results: list[dict] = ()) -> str:
    """Markdown of a model card."""
    return f"# {model.provenance.name}\n"
