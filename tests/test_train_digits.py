"""The script behind the embedded model: everything but the patience."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varcompress.checkpoint import load_official, read_pth
from varcompress.data import digits
from varcompress.evaluation.digits import DigitsFeatures

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs with one view of each image."""
    from varcompress.recipes import train_digits

    folders = [tmp_path_factory.mktemp("digits") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_digits, "VIEWS", 1)
        for folder in folders:
            steps = ["--tokenizer-steps", "40", "--transformer-steps", "4", "--features-steps", "20"]
            patch.setattr("sys.argv", ["train_digits", "--out", str(folder), *steps])
            train_digits.main()
    return folders


def test_the_packaged_data_are_those_of_scikit_learn(trained):
    with np.load(trained[0] / "digits.npz") as made, np.load(digits.FOLDER / "digits.npz") as packaged:
        for name in ("images", "labels"):
            assert np.array_equal(made[name], packaged[name])


def test_two_runs_write_the_same_weights(trained):
    for name in ("vae_digits.pth", "var_digits.pth", "features.pth"):
        first, second = (read_pth(folder / name) for folder in trained)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_it_writes_has_the_shapes_of_what_ships(trained):
    made = load_official(trained[0] / "var_digits.pth", trained[0] / "vae_digits.pth")
    ships = load_official(digits.FOLDER / "var_digits.pth", digits.FOLDER / "vae_digits.pth")
    assert made.var.config == ships.var.config
    assert made.tokenizer.config == ships.tokenizer.config
    DigitsFeatures().load_state_dict(read_pth(trained[0] / "features.pth"))


def test_the_package_stays_small():
    assert sum(file.stat().st_size for file in digits.FOLDER.iterdir()) < 12 * 2**20


def test_the_first_view_is_the_data_set_and_further_views_are_always_the_same():
    images, labels = digits.load_digits()
    assert images.shape == (1797, 3, 16, 16)
    assert len(labels) == 1797
    assert torch.equal(digits.load_digits(3)[0], digits.load_digits(3)[0])
    assert not torch.equal(digits.load_digits(3)[0], images)
