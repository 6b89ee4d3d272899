"""The card of a token store on the Hub: which tokenizer made it of which images. Its text is in store.md.jinja."""

from __future__ import annotations

from pathlib import Path

from varcompress.report.card import sealed
from varcompress.report.format import count, joined

TEMPLATE = Path(__file__).with_name("store.md.jinja")
TAGS = ["varcompress", "visual-autoregressive", "var", "image-tokens"]


def store_card(facts: dict, repo: str, license: str | None = None) -> str:
    """Markdown of the card, metadata included, sealed as a model's is.

    facts: of `store_facts`; repo: Hub id under which it will be loaded; license: as the Hub writes it.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    views = facts["views"]
    card = DatasetCard.from_template(
        DatasetCardData(license=license, tags=TAGS, viewer=False),  # which would take store.json for the data
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        repo=repo,
        facts=facts,
        images=count(facts["num_images"], "image"),
        views=count(views, "view"),
        patch_nums=joined(facts["patch_nums"]),
        size=f"{facts['bytes']:,}",
        options=f" --set views={views}" if views > 1 else "",
    )
    return sealed(f"{card}\n")
