"""The page: what it shows, what it refuses, that it loads nothing, and how a browser lays it out."""

from __future__ import annotations

import copy
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import random_model
from tests.hub_server import TOKEN
from varcompress.cost import describe
from varcompress.drawing import draw_images
from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.images import pixels
from varcompress.loading import load
from varcompress.publish import push, save
from varcompress.report.charts import front_of
from varcompress.report.page import Subject, render
from varcompress.report.published import PUBLISHED
from varcompress.reporting import write_report

CONDITIONS = {
    **{"schema": 2, "command": "varcompress eval /home/ann/model -s full", "model": "tiny"},
    **{"device": "Some CPU", "torch": "2.14.1", "varcompress": "0.1.0", "dtype": "float32", "kernels": "torch"},
    **{"packed_weights": False, "cache_dtype": "float32", "offload": None, "guided": True, "batch_size": 50},
}
COST = {"latency_ms": 20.0, "images_per_second": 400.0, "peak_bytes": 3 * 2**20, "cache_bytes": 2**20}
FD = {"value": 12.25, "interval": [11.5, 13.0]}
NOISE = {"value": 12.5, "interval": [11.0, 14.0], "difference": 0.25, "difference_interval": [-0.5, 1.0]}
EVAL = {
    "kind": "eval",
    **CONDITIONS,
    "protocol": "digits",
    "deviations": ["200 images instead of 2,000"],
    "reference": "/home/ann/cats.npz",
    "reference_details": {"digest": "7cf4", "sha256": "ab" * 32, "images": 1797, "size": 8, "statistics": "its images"},
    "features": {"name": "digits", "printed": "digits", "sha256": "cd" * 32},
    "torch_fidelity": "0.4.0",
    "settings": {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seeds": [0, 1], "images": 200, "rounding": "round"},
    "seconds": 18.2,
    "processes": 1,
    "notes": ["not comparable with scores on Inception"],
    "schedules": [
        {"schedule": "full", "scores": {"fd": FD, "is": {"value": 8.0, "interval": [7.9, 8.1]}}, **COST},
        {"schedule": "d4@2", "scores": {"fd": NOISE}, **COST, "latency_ms": 10.0},
        {"model": "smaller", "schedule": "full", "scores": {"fd": {"value": 40.0, "interval": [39, 41]}}, **COST},
    ],
}
PREDICTED = {
    **{"peak_bytes": 3 * 2**20, "cache_bytes": 2**20, "weight_bytes": 10**6, "flops": 10**9},
    **{"speedup": 1.75, "speedup_without_decoder": 2.25},
}
PROFILE = {
    "kind": "profile",
    **CONDITIONS,
    "settings": {"cfg": 1.5, "seed": 0},
    "runs": 5,
    "schedules": [
        {
            **{"schedule": name, **COST, **PREDICTED, "latency_spread_ms": [19.0, 21.0]},
            **{f"{name}_predicted": value * 1.5 for name, value in PREDICTED.items()},
            **{"transformer_ms": 12.0, "sampling_ms": 3.0, "decoder_ms": 5.0, "memory_ratio": 1.0, "cache_ratio": 0.5},
        }
        for name in ("full", "d4@2")
    ],
}
CELL = {"increase": 0.25, "increase_error": 0.01}
SENSITIVITY = {
    "kind": "sensitivity",
    **CONDITIONS,
    **{"command": "varcompress sensitivity model --data cats", "seconds": 61.5},
    **{
        "data": {"name": "cats", "digest": "ef" * 32, "images": 64},
        "patch_nums": [1, 2],
        "bridge": 1,
        "depths": [4],
        "full": {"loss": 2.5},
    },
    **{which: [{"depth": 4, "scale": scale, **CELL} for scale in (1, 2)] for which in ("only", "from")},
    "layers": [{"layer": layer, "after_bridge": CELL, "everywhere": {"increase": 1.75}} for layer in range(6)],
}
STEPS = [
    {"step": step, "losses": {"full": 3 / step, "d4@2": 4 / step}}
    | ({"heldout": {"losses": {"full": 3.5 / step}}} if step % 5 == 0 else {})
    for step in range(1, 21)
]


@pytest.fixture(scope="module")
def model_folder(elastic, tmp_path_factory):
    """An elastic directory with all that a page can show."""
    folder = save(load(elastic, device="cpu"), tmp_path_factory.mktemp("all") / "cats")
    weights = {"weights": fingerprint(load(folder, device="cpu"))}
    for result in (EVAL, PROFILE, SENSITIVITY):
        (folder / f"{result['kind']}.json").write_text(json.dumps(result | weights))
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    return folder


@pytest.fixture(scope="module")
def page(model_folder, tmp_path_factory):
    path = write_report([model_folder], tmp_path_factory.mktemp("page") / "a.html", samples=3, device="cpu")
    return path.read_text(encoding="utf-8")


def results_folder(tmp_path, name="results", **results):
    folder = tmp_path / name
    folder.mkdir()
    for stem, result in results.items():
        (folder / f"{stem}.json").write_text(json.dumps({"weights": "ffff", **result}))
    return folder


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of its style sheets."""

    def __init__(self, text):
        super().__init__()
        self.found, self.styles, self._inside = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside == "style":
            self.styles += data


def words(text):
    """What a page says, without its elements."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text.partition("<body>")[2]))


# -- what it shows --------------------------------------------------------------------------------


def test_everything_that_is_known_is_shown(page, model_folder):
    said = words(page)
    for part in (
        fingerprint(load(model_folder, device="cpu")),
        "depths 4, 2 of 6",
        "digits FD\N{NO-BREAK SPACE}↓",
        "12.2 ± 0.75",
        "11.5 to 13.0",
        "12.5 ± 1.5 ≈",
        "+0.250 ≈",
        "smaller",
        "on the front of",
        "departs from its protocol",
        "200 images instead of 2,000",
        "not comparable with scores on Inception",
        "Below a latency stand its quartiles",
        "2.62",  # a predicted speed-up
        "20 steps",
        "Loss on images held out",
        "Fewer layers at only one scale",
        "Without one layer",
        ".25",
        "varcompress eval model -s full",
        "torch-fidelity 0.4.0",
        "ab" * 32,
        "cd" * 32,
        "cats/sensitivity.json",
        "varcompress sensitivity model --data cats",
        "ef" * 32,
        "61.5 s",
        "learning_rate",
    ):
        assert part in said, part
    assert "/home/ann" not in page
    assert len(re.findall(r"smaller +another model", said)) == 3  # scores, costs, differences
    assert said.count("another model") == 3
    assert page.count("<svg") == 3 + 2 + 2  # quality against three costs, a profile, a run


def test_the_samples_are_those_of_the_same_streams(page, model_folder):
    model = load(model_folder, device="cpu")
    images = [attributes for tag, attributes in Elements(page).found if tag == "img"]
    schedules = [str(schedule) for schedule in model.default_schedules()]
    assert len(images) == 3 * len(schedules)
    assert [image["alt"] for image in images[:3]] == [f"class {label} under full" for label in (0, 4, 9)]
    shown = [np.asarray(Image.open(_bytes(image["src"])).convert("RGB")) for image in images]
    drawn = np.concatenate([pixels(draw_images(model, [0, 4, 9], schedule)) for schedule in schedules])
    np.testing.assert_array_equal(np.stack(shown), drawn)


def _bytes(source):
    import base64

    return io.BytesIO(base64.b64decode(source.partition(",")[2]))


@pytest.mark.parametrize("samples", [0, 1])
def test_what_is_not_there_is_not_shown(elastic, tmp_path, samples):
    text = write_report([elastic], tmp_path / "a.html", samples=samples, device="cpu").read_text()
    for heading in ("Quality against cost", "predicted beside measured", "Training", "Where depth hurts", "again"):
        assert f"{heading}</h2>" not in text
    assert "The model</h2>" in text
    assert ("left out with --samples 0" in text) == (samples == 0)


def test_a_folder_of_results_needs_no_model(tmp_path):
    folder = results_folder(tmp_path, eval=EVAL)
    Image.new("RGB", (8, 8), "red").save(folder / "samples.png")
    written = write_report([folder])
    assert written == folder / "report.html"
    text = written.read_text()
    assert "no model to draw them with" in text
    assert "The model</h2>" not in text
    assert 'alt="samples.png of results"' in text


def test_comparable_results_stand_side_by_side(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    folders = [results_folder(tmp_path, f"{name}/run", eval=EVAL, profile=PROFILE) for name in ("one", "two")]
    text = write_report([*folders, folders[0]], tmp_path / "a.html").read_text()
    assert "<h1>one/run, two/run</h1>" in text
    assert words(text).count("12.2 ± 0.75") == 2
    assert 'class="legend"' in text


def test_a_demo_shows_what_was_before(tmp_path):
    folder = results_folder(tmp_path, eval=EVAL, demo={"kind": "demo", "untrained": EVAL | {"weights": "eeee"}})
    assert "results (before distilling)" in write_report([folder]).read_text()


IMAGENET = EVAL | {
    **{"protocol": "adm-imagenet256", "deviations": [], "model": "var-d30"},
    "features": EVAL["features"] | {"name": "inception", "printed": "inception"},
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"protocol": "quick"}, "the scores follow the protocol quick"),
        ({"deviations": ["cfg 4.0 instead of 1.5"]}, "departs from adm-imagenet256"),
        ({"model": "mine"}, "not known to be made from FoundationVision/var"),
    ],
)
def test_published_points_stand_beside_their_own_protocol_alone(tmp_path, change, why):
    said = words(write_report([results_folder(tmp_path, eval=IMAGENET | change)]).read_text())
    assert ("Published, not measured here." in said) == (why is None)
    assert all((point.method in said) == (why is None) for point in PUBLISHED if point.method != "VAR-d30")
    if why:
        assert why in said


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_the_front_is_what_nothing_beats(found, more_is_better):
    def beats(a, b):
        better = a[1] >= b[1] if more_is_better else a[1] <= b[1]
        return a[0] <= b[0] and better and a != b

    front = [point for point, on in zip(found, front_of(found, more_is_better=more_is_better), strict=True) if on]
    assert front
    assert not any(beats(a, b) for a in front for b in front)
    assert all(point in front or any(beats(a, point) for a in front) for point in found)


# -- what it refuses ------------------------------------------------------------------------------


def changed(result, path, value):
    result = copy.deepcopy(result)
    at = result
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("result", "path", "value", "told"),
    [
        (
            EVAL,
            ["reference_details", "digest"],
            "other",
            "reference is cats.npz (7cf4) in the one and cats.npz (other)",
        ),
        (EVAL, ["features", "sha256"], "ee" * 32, "features is digits (cdcd"),
        (EVAL, ["protocol"], "quick", "protocol is digits in the one and quick in the other"),
        (EVAL, ["settings", "images"], 50, "setting images is 200 in the one and 50"),
        (EVAL, ["settings", "cfg"], 4.0, "setting cfg is 1.5 in the one and 4.0"),
        (EVAL, ["device"], "Other GPU", "device is Some CPU in the one and Other GPU"),
        (PROFILE, ["dtype"], "bfloat16", "dtype is float32 in the one and bfloat16"),
        (PROFILE, ["batch_size"], 1, "batch size is 50 in the one and 1"),
        (SENSITIVITY, ["data", "digest"], "other", "data is cats (efefefefefefefef) in the one and cats (other)"),
        (SENSITIVITY, ["data", "images"], 8, "images is 64 in the one and 8"),
    ],
)
def test_results_that_do_not_compare_are_refused(tmp_path, run, result, path, value, told):
    kind = result["kind"]
    one, two = (
        results_folder(tmp_path, name, **{kind: each})
        for name, each in (("one", result), ("two", changed(result, path, value)))
    )
    code, out, err = run("report", one, two, "--out", tmp_path / "a.html")
    assert (code, out) == (2, "")
    assert f"one/{kind}.json and two/{kind}.json are not comparable: {told}" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.html").exists()


def test_speed_of_one_device_does_not_stand_beside_scores_of_another(tmp_path):
    folder = results_folder(tmp_path, eval=EVAL, profile=PROFILE | {"device": "Other GPU"})
    with pytest.raises(InputError, match="device is Some CPU in the one and Other GPU"):
        write_report([folder])


def test_a_directory_shows_one_model(tmp_path):
    here = {"eval": EVAL, "profile": PROFILE}
    elsewhere = SENSITIVITY | {"device": "Other GPU", "dtype": "bfloat16"}  # which tells no speed
    assert "Where depth hurts" in write_report([results_folder(tmp_path, **here, sensitivity=elsewhere)]).read_text()
    for kind, result in (("sensitivity", SENSITIVITY), ("profile", PROFILE)):
        folder = results_folder(tmp_path, f"of {kind}", **here | {kind: result | {"weights": "eeee"}})
        with pytest.raises(InputError, match=rf"eval.json and of {kind}/{kind}.json are of different weights"):
            write_report([folder])
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["eval", "profile-2", "sensitivity", "demo"])
@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "KIND", "schema": 1}'])
def test_a_result_that_cannot_be_read_is_not_left_out(tmp_path, run, name, content):
    folder = results_folder(tmp_path, "results", **{"eval-3": EVAL})
    (folder / f"{name}.json").write_text(content.replace("KIND", name.partition("-")[0]))
    code, out, err = run("report", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"results/{name}.json: " in err
    assert not (folder / "report.html").exists()


def test_results_of_other_weights_are_refused(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    for kind, result in (("eval", EVAL), ("sensitivity", SENSITIVITY)):
        (folder / f"{kind}.json").write_text(json.dumps(result | {"weights": "ffff"}))
        with pytest.raises(InputError, match=rf"model/{kind}.json: was not measured on these weights"):
            write_report([folder], device="cpu")
        (folder / f"{kind}.json").unlink()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schedules", 0, "scores", "fd", "value"], "1"),
        (["schedules", 0, "scores", "fd", "interval"], [1]),
        (["schedules", 0, "latency_ms"], None),
        (["schedules", 0, "cache_bytes"], 10**400),
        (["schedules"], {}),
        (["settings"], None),
        (["features"], "digits"),
        (["reference_details"], []),
    ],
)
def test_damaged_results_are_one_line(tmp_path, path, value):
    folder = results_folder(tmp_path, eval=changed(EVAL, path, value))
    with pytest.raises(InputError, match=r"results/eval.json: the eval result (is damaged|lacks)"):
        write_report([folder])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone"], "gone: no such directory"),
        (["."], "holds no model, no result"),
        ([".", "--out", "a"], "ends in .html"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, told, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert not list(tmp_path.iterdir())


# -- what others wrote ----------------------------------------------------------------------------

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'$x$ {{ 7 * 7 }}"


LONG = "x" * 300  # where no line can be broken


def spiked(value, text):
    """A result in which `text` follows every text."""
    if isinstance(value, dict):
        return {key: spiked(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [spiked(item, text) for item in value]
    return value + text if isinstance(value, str) else value


def foreign_page(text):
    """A page of everything, with `text` wherever a result, a model or a log can have one."""
    evil = {
        "eval": spiked(EVAL, text) | {"kind": "eval", "weights": text},
        "profile": spiked(PROFILE, text) | {"kind": "profile", "weights": text},
    }
    evil["eval"]["settings"][text] = text
    evil["eval"]["features"]["name"] = "inception"
    steps = [{"step": step, "losses": {text: 1.0}, "heldout": {"losses": {text: 1.0}}} for step in (1, 2)]
    model = {**spiked(describe(random_model()), text), "weights": text, "recipe": {text: text}}
    subject = Subject(
        text,
        model=model | {"image_size": 8},
        results=evil,
        steps=steps,
        samples={text: [b"image"], "other": [b"image"]},
        classes=[0],
        picture=b"picture",
        sensitivity=spiked(SENSITIVITY, text) | {"kind": "sensitivity", "weights": text},
    )
    return render([subject, Subject("other", steps=steps)])


def test_text_of_foreign_results_stays_text():
    text = foreign_page(EVIL)
    elements = Elements(text).found
    assert not [tag for tag, _ in elements if tag in ("script", "iframe", "object", "embed", "base", "form")]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert {tag for tag, attributes in elements if "src" in attributes} == {"img"}
    assert "x" not in [attributes.get("src") for _, attributes in elements]
    assert text.count("&lt;script&gt;") > 50
    assert "{{ 7 * 7 }}" in html.unescape(text)


# -- alone in the world ---------------------------------------------------------------------------


def test_the_page_loads_nothing(page):
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "audio", "video", "source")
        assert not {"srcset", "poster", "data", "action", "background", "xlink:href"} & set(attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if "href" in attributes:
            assert tag == "a" or attributes["href"].startswith("#"), (tag, attributes["href"])
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_same_page_is_written_again(tmp_path):
    folder = results_folder(tmp_path, eval=EVAL)
    first, second = (write_report([folder], tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second


# -- on the Hub -----------------------------------------------------------------------------------


def test_push_publishes_the_page_of_these_weights_alone(elastic, hub, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    write_report([folder], samples=1, device="cpu")
    assert "report.html" in push(folder, "ann/model")["files"]
    assert TOKEN not in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    push(folder, "ann/model")
    from huggingface_hub import HfApi

    assert "report.html" not in HfApi().list_repo_files("ann/model")
    (folder / "report.html").write_text("<p>of another model")
    with pytest.raises(InputError, match=r"report\.html: does not show these weights: write it anew"):
        push(folder, "ann/model")


# -- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
PHONE, DESK = 390, 1280
# Unfolds all and chooses the second schedule, then tells which samples were seen before and after, what the page
# loaded, and which elements lie beyond its edge outside boxes that scroll.
PROBE = """<script>addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const beyond = [...document.querySelectorAll("body *")].filter(element =>
    !element.closest(".scroll > *, svg *") && element.getBoundingClientRect().right > innerWidth + 0.5);
  const panels = () => [...document.querySelectorAll(".panel")].flatMap((panel, i) => panel.offsetHeight ? [i] : []);
  const before = panels();
  document.querySelector(".switch label:nth-of-type(2)")?.click();
  parent.postMessage({
    width: innerWidth, scroll: document.documentElement.scrollWidth, panels: [before, panels()],
    beyond: beyond.map(element => element.outerHTML.slice(0, 80)),
    requests: performance.getEntriesByType("resource").map(entry => entry.name)}, "*");
});</script>"""
FRAME = """<!DOCTYPE html><body style="margin: 0">
<script>addEventListener("message", told => document.body.append(JSON.stringify(told.data), "END"));</script>
<iframe src="{page}" style="display: block; border: 0; width: {width}px; height: {height}px"></iframe>"""


def browse(tmp_path, *arguments):
    """Run the browser without a network; returns what it printed."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    own = [f"--user-data-dir={tmp_path / 'browser'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, *own, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probed(tmp_path, text, width):
    """What PROBE tells of a page in a frame of that width, since no window is as narrow as a phone."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    (tmp_path / "probed.html").write_text(text.replace(policy[0], PROBE) if policy else PROBE + text, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page="probed.html", width=width, height=900))
    shown = browse(
        tmp_path, f"--window-size={DESK + 100},900", "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()
    )
    return json.loads(html.unescape(re.search(r"(\{&?.*\})END", shown)[1]))


def screenshot(tmp_path, page, width):
    """The upper part of the page as it stands, at that width: (H, W, 3)."""
    frame, picture = tmp_path / "shown.html", tmp_path / f"{width}.png"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=1600))
    browse(tmp_path, f"--window-size={max(width, 500)},1600", f"--screenshot={picture}", frame.as_uri())
    return np.asarray(Image.open(picture).convert("RGB"))[:, :width]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="the browser is not installed: apt-get install chromium")


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_overflows_and_no_request_leaves_the_page(page, tmp_path, width):
    told = probed(tmp_path, page, width)
    assert told == {"width": width, "scroll": width, "panels": [[0], [1]], "beyond": [], "requests": []}
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    picture = screenshot(tmp_path, tmp_path / "page.html", width)
    assert picture.shape[1] == width
    inked = (picture.min(axis=2) < 128).mean(axis=1) > 0  # lines on which something dark stands
    assert 0.2 < inked.mean() < 1
    assert (picture[:, -4:] > 240).all()  # the right margin is empty


@needs_browser
def test_long_words_of_foreign_results_overflow_nothing(tmp_path):
    told = probed(tmp_path, foreign_page(LONG), PHONE)
    assert (told["scroll"], told["beyond"], told["requests"]) == (PHONE, [], [])


@needs_browser
def test_the_probe_sees_what_overflows_and_what_is_loaded(tmp_path):
    wide = '<meta name="viewport" content="width=device-width"><p style="width: 900px">wide<img src="http://a.invalid/b.png">'
    told = probed(tmp_path, wide, PHONE)
    assert told["scroll"] > PHONE
    assert len(told["beyond"]) == 1
    assert told["requests"] == ["http://a.invalid/b.png"]
