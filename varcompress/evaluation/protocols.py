"""Protocols: all that a score depends on beside the weights, so that another person gets the same number.

The trouble with VAR's FID is that it is not reproduced: images not balanced over classes, other sampling settings,
statistics of another reference or network, no rounding to 8 bits. A protocol names each of these, and a result says in
what it departs from its protocol.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from varcompress.data.digits import Digits
from varcompress.data.interface import NamedSource
from varcompress.data.sources import own_source
from varcompress.errors import InputError
from varcompress.evaluation.inception import INCEPTION_SHA256
from varcompress.images import ROUND, TRUNCATE
from varcompress.models.elastic import ElasticVAR
from varcompress.sampling import PUBLISHED, Sampling

EXACT_DISTANCES, ADM_DISTANCES = "exact", "adm"
DISTANCES = (EXACT_DISTANCES, ADM_DISTANCES)
SHUFFLED, CONSECUTIVE = "shuffled", "consecutive"
ADM_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class PinnedReference:
    """A reference file. images: how many it holds; size: their side; sha256: None where no digest of it is known."""

    name: str
    url: str
    images: int
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """What an evaluation does where the user says nothing else.

    about: one line for a person; image_size, classes: of the models it is for, None for any; images_per_class: drawn
    under each schedule; rounding: to 8 bits; reference: the file, None where the user's, or the model's own, is taken;
    features: the network, None for the one that fits the model, and the digest of its weights, None of
    those that are not known beforehand; inception_groups: of the Inception Score, 10 shuffled
    ones or consecutive ones of 5,000; distances: behind precision, recall, density and coverage, "exact" or "adm";
    source: the source of the package whose models it is for.
    """

    name: str
    about: str
    images_per_class: int
    image_size: int | None = None
    classes: int | None = None
    sampling: Sampling = PUBLISHED
    rounding: str = ROUND
    reference: PinnedReference | None = None
    features: str | None = None
    features_sha256: str | None = None
    inception_groups: str = SHUFFLED
    distances: str = EXACT_DISTANCES
    source: type[NamedSource] | None = None

    def fits(self, model: ElasticVAR) -> bool:
        """Whether it is made for images and classes such as this model's."""
        if self.source is not None:
            return own_source(model) is self.source
        size, classes = model.tokenizer.config.image_size, model.var.config.classes
        return self.image_size in (None, size) and self.classes in (None, classes)


def _adm(size: int, file: str, sha256: str | None) -> Protocol:
    return Protocol(
        f"adm-imagenet{size}",
        f"the figures that papers print for ImageNet at {size} pixels (openai/guided-diffusion's evaluator)",
        images_per_class=50,
        image_size=size,
        classes=1000,
        rounding=TRUNCATE,  # as ADM's own samplers and VAR's notebooks do
        reference=PinnedReference(file, f"{ADM_REFERENCES}/{size}/{file}", 10_000, size, sha256),
        features="inception",
        features_sha256=INCEPTION_SHA256,
        inception_groups=CONSECUTIVE,
        distances=ADM_DISTANCES,
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _adm(
            256, "VIRTUAL_imagenet256_labeled.npz", "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
        ),
        _adm(512, "VIRTUAL_imagenet512.npz", None),
        Protocol(
            "digits",
            "the embedded model, on its own images and features",
            images_per_class=200,
            image_size=Digits.image_size,
            classes=Digits.classes,
            features="digits",
            source=Digits,
        ),
        Protocol("quick", "a first look: a few images of each class, comparable with nothing else", images_per_class=5),
    )
}


def choose_protocol(name: str | None, model: ElasticVAR) -> Protocol:
    """The protocol called so; None for the first that is made for such a model.

    Raises InputError for an unknown name, and for one that is made for other images or classes.
    """
    if name is None:
        return next(protocol for protocol in PROTOCOLS.values() if protocol.fits(model))
    protocol = _named(name)
    if not protocol.fits(model):
        size, classes = model.tokenizer.config.image_size, model.var.config.classes
        raise InputError(
            f"protocol {name} is for {protocol.classes} classes in {protocol.image_size} pixels, "
            f"and the model has {classes} in {size}: leave --protocol out, or use quick"
        )
    return protocol


def describe_protocol(name: str) -> dict:
    """A protocol as a dict that JSON can hold. Raises InputError for an unknown name."""
    described = asdict(_named(name))
    source = described.pop("source")
    if source:
        described["reference"] = source.name
    del described["sampling"]["seed"]  # which a protocol leaves open
    return described


def _named(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name!r} is unknown: choose {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Done:
    """What an evaluation did, as far as a protocol speaks of it. reference_sha256: of a file, None of anything else."""

    images: int
    classes: int
    sampling: Sampling
    rounding: str
    reference: str
    reference_sha256: str | None
    features: str
    distances: str
    resized: bool = False


def deviations(protocol: Protocol, done: Done) -> list[str]:
    """In what an evaluation departs from its protocol, each as one phrase; none where it keeps to it."""
    asked = protocol.images_per_class * done.classes
    found = [f"{done.images:,} images instead of {asked:,}"] if done.images != asked else []
    pairs = {name: (value, asdict(protocol.sampling)[name]) for name, value in asdict(done.sampling).items()}
    del pairs["seed"]
    pairs |= {
        "rounding": (done.rounding, protocol.rounding),
        "features": (done.features, protocol.features or done.features),
        "distances": (done.distances, protocol.distances),
    }
    found += [f"{name} {value} instead of {usual}" for name, (value, usual) in pairs.items() if value != usual]
    pinned = protocol.reference
    name, digest = Path(done.reference).name, done.reference_sha256
    if protocol.source and done.reference != protocol.source.name:
        found.append(f"reference {name} instead of the {protocol.source.name}")
    elif pinned and (digest is None or pinned.sha256 not in (None, digest)):
        what = f"{name} with the SHA-256 {digest[:8]}…" if digest else name
        usual = f"{pinned.name} with {pinned.sha256[:8]}…" if pinned.sha256 else pinned.name
        found.append(f"reference {what} instead of {usual}")
    elif pinned and pinned.sha256 is None:
        found.append(f"the digest of {pinned.name} is not pinned: compare the SHA-256 in the result")
    if done.resized:
        found.append("images of the reference resized")
    return found
