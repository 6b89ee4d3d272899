"""What the demo draws, on whatever device its images are."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.conftest import OnDevice, score_of
from varcompress.demo import sample_rows
from varcompress.models.elastic import ElasticVAR
from varcompress.report.plots import plot_samples


class ModelOnDevice(ElasticVAR):
    def generate(self, *arguments, **options):
        return super().generate(*arguments, **options).as_subclass(OnDevice)


def test_samples_of_another_device_are_drawn(tiny, tmp_path):
    model = ModelOnDevice(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2))
    rows = sample_rows(model)
    scores = {"untrained": score_of(9.0, 0.5), "score": score_of(3.0, 0.25)}
    costs = [{"schedule": str(s), "cache_bytes": 2, "speedup": 1.5, **scores} for s in model.default_schedules()]
    result = {"score": "fd", "features": "digits", "teacher": costs[0], "schedules": costs}
    plot_samples({"before": rows, "after": rows}, result, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB"))[::3, ::3].reshape(-1, 3), axis=0)) > 100
