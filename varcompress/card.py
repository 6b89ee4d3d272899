"""The model card: what a person who finds the model on the Hub wants to know, and metadata by which it is found.

Metadata follows https://huggingface.co/docs/hub/model-cards and is written by huggingface_hub's own
ModelCardData. Every number is arithmetic on the schedule, and says so, or comes from a result given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath

import yaml

from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import Schedule

TASK = "unconditional-image-generation"  # the Hub's nearest task: it has none for class-conditional models
TAGS = ["visual-autoregressive", "var", "class-conditional-image-generation", "elastic-depth", "model-compression"]
# base model on the Hub: the dataset on the Hub that it was trained on
TRAINED_ON = {"FoundationVision/var": "ILSVRC/imagenet-1k"}
# stem of a well-known reference: dataset id and name
REFERENCES = {
    "VIRTUAL_imagenet256_labeled": ("ILSVRC/imagenet-1k", "ImageNet 256x256, ADM reference batch"),
    "VIRTUAL_imagenet512": ("ILSVRC/imagenet-1k", "ImageNet 512x512, ADM reference batch"),
    "embedded digits": ("digits", "Handwritten digits of scikit-learn"),
}
METRICS = {
    "fid": "FID",
    "is": "IS",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    # Scores on the digits' own small feature network: never to be mistaken for those on Inception.
    "digits_fd": "Fréchet distance, digits features",
    "digits_is": "IS, digits features",
    "digits_kid": "KID, digits features",
    "digits_precision": "Precision, digits features",
    "digits_recall": "Recall, digits features",
}
MISSING = "\N{EN DASH}"
CITATIONS = """\
```bibtex
@misc{chen2025variant,
  title         = {Progressive Supernet Training for Efficient Visual Autoregressive Modeling},
  author        = {Chen, Xiaoyue and Shi, Yuling and Li, Kaiyuan and Wang, Huandong and Li, Yong and Gu, Xiaodong
                   and Chen, Xinlei and Lin, Mingbao},
  year          = {2025},
  eprint        = {2511.16546},
  archivePrefix = {arXiv}
}

@misc{tian2024var,
  title         = {Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction},
  author        = {Tian, Keyu and Jiang, Yi and Yuan, Zehuan and Peng, Bingyue and Wang, Liwei},
  year          = {2024},
  eprint        = {2404.02905},
  archivePrefix = {arXiv}
}
```"""


def model_card(
    model: ElasticVAR, results: Sequence[dict] = (), *, repo: str | None = None, plots: Mapping[str, str] | None = None
) -> str:
    """Markdown of a model card, metadata included.

    results: of `profile` and `evaluate`; repo: Hub id under which it will be loaded;
    plots: file name beside the card -> what it shows.
    """
    title = repo.split("/")[-1] if repo else model.provenance.name
    sections = [
        f"# {title}",
        _what(model),
        _use(model, repo or "PATH"),
        _schedules(model),
        _measured(results, plots or {}),
        _recipe(model),
        _licence(model),
        f"## Citation\n\n{CITATIONS}",
    ]
    return f"---\n{_metadata(model, results, title)}\n---\n\n" + "\n\n".join(sections) + "\n"


# -- metadata -----------------------------------------------------------------------------------


def _metadata(model: ElasticVAR, results: Sequence[dict], title: str) -> str:
    from huggingface_hub import ModelCardData  # slow to import, and only saving and pushing need it

    base = model.provenance.base_model
    scores = _scores(results)
    data = ModelCardData(
        model_name=title,
        license=model.provenance.license,
        base_model=base,
        datasets=[TRAINED_ON[base]] if base in TRAINED_ON else None,
        library_name="varcompress",
        pipeline_tag=TASK,
        tags=TAGS,
        eval_results=scores or None,
    )
    if not scores:
        data.pop("model_name")  # belongs to the model index: ModelCardData leaves it behind when there is none
    return data.to_yaml()


def _scores(results: Sequence[dict]) -> list:
    """The eval results as huggingface_hub.EvalResult: one per schedule and metric that was measured."""
    from huggingface_hub import EvalResult

    scores = []
    for result in results:
        if result["kind"] != "eval":
            continue
        dataset, name = _reference(result["reference"])
        settings = {key: value for key, value in result["settings"].items() if value is not None}
        scores += [
            EvalResult(
                task_type=TASK,
                task_name="Class-conditional image generation",
                dataset_type=dataset,
                dataset_name=name,
                metric_type=metric,
                metric_name=f"{METRICS[metric]} ({row['schedule']})",
                metric_value=row[metric],
                metric_args={"schedule": row["schedule"], "features": result["features"], **settings},
            )
            for row in result["schedules"]
            for metric in METRICS
            if row.get(metric) is not None
        ]
    return scores


def _reference(reference: str) -> tuple[str, str]:
    """Dataset id and name of an eval's reference, without the folders it lay in."""
    path = PurePath(reference)
    slug = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")
    return REFERENCES.get(path.stem, (slug or "images", path.name))


# -- sections -----------------------------------------------------------------------------------


def _what(model: ElasticVAR) -> str:
    config, size = model.var.config, model.tokenizer.config.image_size
    scales, base = len(config.patch_nums), model.provenance.base_model
    origin = f", made from [{base}](https://huggingface.co/{base})" if base else ""
    trained = (
        f"it was trained for {_listed(model.depths)} of its {config.depth} layers"
        if model.depths
        else "its weights are untouched, so only `full` gives the quality it was trained for"
    )
    return (
        f"A [VAR](https://arxiv.org/abs/2404.02905) image generator of {config.depth} layers, {config.classes} "
        f"classes and {size} x {size} pixels{origin}, with its tokenizer, whose depth is chosen at each call by the "
        f"method of [VARiant](https://arxiv.org/abs/2511.16546). The first {model.bridge} of {scales} scales run all "
        f"layers, the later and larger ones as few as the schedule says; {trained}."
    )


def _use(model: ElasticVAR, repo: str) -> str:
    # the deepest subnet that was trained; untouched weights are good at full depth only
    schedule = model.default_schedules()[1 if model.depths else 0]
    return f"""\
## Use

With `varcompress` installed, in Python:

```python
import varcompress

model = varcompress.load("{repo}")
images = model.generate([0, 1], schedule="{schedule}", seed=0)  # (B, 3, H, W) float in [0, 1]
```

or on the command line:

```sh
varcompress sample {repo} --classes 0,1 -s {schedule} --out samples.png
varcompress inspect {repo}
```"""


def _schedules(model: ElasticVAR) -> str:
    schedules = model.default_schedules()
    config, full = model.var.config, schedules[0]
    shape = {"width": config.width, "vocab": config.vocab, "mlp_ratio": config.mlp_ratio}
    rows = [
        [
            f"`{schedule}`",
            _runs(schedule),
            "all" if len(schedule.layers[-1]) == config.depth else ", ".join(map(str, schedule.layers[-1])),
            f"{schedule.peak_rows / full.peak_rows:.0%}",
            f"{schedule.flops(**shape) / full.flops(**shape):.0%}",
        ]
        for schedule in schedules
    ]
    header = ["schedule", "layers x scales", "layers at the last scale", "KV cache", "FLOPs of the transformer"]
    return (
        "## Schedules\n\nOne set of weights; switching costs nothing. Cache and FLOPs follow by arithmetic and are "
        f"relative to `full`.\n\n{_table(header, rows)}"
    )


def _measured(results: Sequence[dict], plots: Mapping[str, str]) -> str:
    tables = [_profile(result) if result["kind"] == "profile" else _eval(result) for result in results]
    pictures = [f"![{shows}]({name})" for name, shows in plots.items()]
    return "\n\n".join(["## Measured", *(tables + pictures or ["Not measured."])])


def _profile(result: dict) -> str:
    columns: dict[str, Callable[[dict], str]] = {
        "schedule": lambda row: f"`{row['schedule']}`",
        "latency, ms": lambda row: _number(row.get("latency_ms"), 1),
        "images/s": lambda row: _number(row.get("images_per_second"), 2),
        "speed-up": lambda row: _number(row.get("speedup"), 2),
        "speed-up without decoder": lambda row: _number(row.get("speedup_without_decoder"), 2),
        "peak memory, MiB": lambda row: _mebibytes(row.get("peak_bytes")),
        "KV cache, MiB": lambda row: _mebibytes(row.get("cache_bytes")),
    }
    caption = (
        f"Speed and memory of a batch of {result['batch_size']} in {result['dtype']} on {result['device']} "
        f"(torch {result['torch']}, median of {result['runs']} runs; the tokenizer's decoder included unless said)."
    )
    return f"### Speed and memory\n\n{caption}\n\n{_rows(columns, result['schedules'])}"


def _eval(result: dict) -> str:
    rows, settings = result["schedules"], result["settings"]
    columns: dict[str, Callable[[dict], str]] = {"schedule": lambda row: f"`{row['schedule']}`"}
    for metric, label in METRICS.items():
        if any(metric in row for row in rows):
            columns[label] = lambda row, metric=metric: _score(row, metric)
    columns |= {
        "latency, ms": lambda row: _number(row.get("latency_ms"), 1),
        "images/s": lambda row: _number(row.get("images_per_second"), 2),
        "peak memory, MiB": lambda row: _mebibytes(row.get("peak_bytes")),
        "KV cache, MiB": lambda row: _mebibytes(row.get("cache_bytes")),
    }
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    caption = (
        f"Against {_reference(result['reference'])[1]} with {result['features']} features ({told}), "
        f"batches of {result['batch_size']} in {result['dtype']} on {result['device']}."
    )
    notes = "\n".join(f"- {note}" for note in result.get("notes", []))
    return "\n\n".join(filter(None, ["### Image quality", caption, _rows(columns, rows), notes]))


def _recipe(model: ElasticVAR) -> str:
    recipe = model.provenance.recipe
    if recipe is None:
        return "## Recipe\n\nNone: the weights are as their authors published them."
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    return f"## Recipe\n\nThe recipe that `varcompress distill` made it with:\n\n```yaml\n{text}\n```"


def _licence(model: ElasticVAR) -> str:
    base, licence = model.provenance.base_model, model.provenance.license
    lines = [
        f"Licence: {licence}." if licence else "Licence: not stated; ask the publisher before use.",
        f"Base model: [{base}](https://huggingface.co/{base})." if base else "Base model: none is stated.",
    ]
    return "## Licence and base model\n\n" + " ".join(lines)


# -- cells and tables ---------------------------------------------------------------------------


def _runs(schedule: Schedule) -> str:
    """30x6, 8x4: the layers in use and for how many scales."""
    return ", ".join(f"{len(s.layers)}x{len(s.scales)}" for s in schedule.segments)


def _listed(depths: Sequence[int]) -> str:
    *most, last = map(str, depths)
    return f"{', '.join(most)} and {last}" if most else last


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _mebibytes(value: int | None) -> str:
    """Whole MiB, or two digits of less than ten of them."""
    return MISSING if value is None else _number(value / 2**20, 0 if value >= 10 * 2**20 else 2)


def _score(row: dict, metric: str) -> str:
    """A score with its spread, where the eval gives one."""
    value, spread = row.get(metric), row.get(f"{metric}_std")
    digits = 4 if metric.endswith("kid") else 2
    return _number(value, digits) + (f" ± {_number(spread, digits)}" if value is not None and spread else "")


def _rows(columns: Mapping[str, Callable[[dict], str]], rows: Sequence[dict]) -> str:
    return _table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
