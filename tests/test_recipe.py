"""Recipes: what they accept, what they refuse and how, and where they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from varcompress.errors import InputError
from varcompress.training.recipe import (
    MADE_FOR,
    Recipe,
    copy_recipe,
    load_recipe,
    machine_fields,
    recipe_names,
    recipe_text,
    recipe_title,
    recipes_for,
    with_origin,
)

SMALL = {"name": "small", "depths": [4, 2], "bridge": 2, "epochs_subnet": 1}
DRAWN = {"epochs_subnet": 0, "epochs": 2, "depth_probability": {"full": 0.5, 4: 1, 2: 1}}
TAUGHT = {"teacher": "frozen", "loss": "kl"}
NONE = {"guidance": "none", "label_drop": 0}


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_published_figures_of_variant_d30():
    recipe = load_recipe("variant-d30")
    assert (recipe.depths, recipe.bridge) == ((16, 8, 4, 2), 6)
    assert (recipe.epochs_full, recipe.epochs_ramp, recipe.epochs_subnet) == (5, 15, 10)
    assert (recipe.p_start, recipe.p_end, recipe.learning_rate, recipe.batch_size) == (0.2, 1.0, 1e-6, 1024)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid_and_survives_yaml(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_title(name)
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_of_each_of_its_figures_where_it_comes_from(name):
    recipe, text = load_recipe(name), yaml.safe_load(recipe_text(name))
    said = [key for keys in recipe.origin.values() for key in keys]
    assert len(said) == len(set(said))
    assert set(said) == set(text) - machine_fields() - {"name", "seed"}


def test_what_a_user_changes_is_no_longer_said_to_come_from_elsewhere(tmp_path):
    copied = copy_recipe("variant-d30", tmp_path)
    copied.write_text(copied.read_text().replace("learning_rate: 1e-6", "learning_rate: 1e-5"))
    for recipe in (load_recipe("variant-d30", ["learning_rate=1e-5"]), load_recipe(copied)):
        assert recipe.learning_rate == 1e-5
        assert "learning_rate" not in recipe.origin["published"]
        assert "batch_size" in recipe.origin["published"]


@pytest.mark.parametrize("name", ["variant-d30", "distil-d30"])
@pytest.mark.parametrize("settings", [["name=mine"], ["name=mine", "weight_decay=0.1"], ["weight_decay=0.1"]])
def test_only_figures_of_a_recipe_of_the_package_claim_its_origin(name, settings, tmp_path):
    recipe, ours = load_recipe(name, settings), load_recipe(name).origin
    changed = [key for key in ("weight_decay",) if getattr(recipe, key) != 0]
    expected = {origin: tuple(key for key in keys if key not in changed) for origin, keys in ours.items()}
    assert recipe.origin == expected | ({"changed": tuple(changed)} if changed else {})
    saved = write(tmp_path, yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(saved) == recipe  # what it says of itself holds when it is read again


def test_a_value_that_another_recipe_claims_is_no_claim_of_a_copy():
    """VARiant's learning rate is published, and a guess where it was carried to another model."""
    for name in ("distil-d30", "mine"):
        recipe = load_recipe("distil-d30", [f"name={name}", "learning_rate=1e-6"])
        assert recipe.origin["changed"] == ("learning_rate",)


def test_what_is_added_to_a_copy_is_changed_by_hand():
    recipe = load_recipe("digits-guided", ["name=mine", "teacher_logits=stored", "teacher_top=16", "accumulation=2"])
    assert recipe.origin["changed"] == ("teacher_logits", "teacher_top")


def test_a_recipe_that_was_changed_from_python_claims_no_more(tiny):
    recipe = with_origin(replace(load_recipe("variant-d30"), learning_rate=1e-5))
    assert recipe.origin["changed"] == ("learning_rate",)
    assert with_origin(recipe) == recipe
    own = Recipe.from_dict(SMALL)
    assert with_origin(own) == own


def test_origins_are_set_as_a_mapping():
    recipe = load_recipe("digits", ["origin={published: [cfg], embedded: [epochs]}"])
    assert (recipe.origin["published"], recipe.origin["embedded"]) == (("cfg",), ("epochs",))
    with pytest.raises(InputError, match="origin: published must be a list such as"):
        load_recipe("digits", ["origin={published: cfg}"])


def test_a_weight_of_nothing_is_a_loss_that_is_not_there():
    guided = {**TAUGHT, **NONE, "cfg": 1.5}
    assert Recipe.from_dict({**SMALL, **guided, "loss": {"kl": 1, "cross_entropy": 0}}).cfg == 1.5
    assert Recipe.from_dict({**SMALL, "loss": {"kl": 0, "cross_entropy": 1}}).teacher == "none"


# a key that does nothing, and what makes it do something
IDLE = {
    "p_start": (0.3, {**DRAWN}, {"epochs_full": 1}),
    "p_end": (0.9, {"epochs_full": 1, "epochs_subnet": 0}, {}),
    "epochs": (2, {}, DRAWN),
    "together": (False, {}, DRAWN),
    "teacher_dtype": ("bfloat16", {}, TAUGHT),
    "teacher_logits": ("stored", {}, {**TAUGHT, "teacher_top": 8}),
}


@pytest.mark.parametrize("key", IDLE)
def test_a_key_that_does_nothing_is_refused_and_left_out(key):
    value, without, company = IDLE[key]
    with pytest.raises(InputError, match=f"recipe: {key} goes with .*, without which it does nothing: leave"):
        Recipe.from_dict({**SMALL, **without, key: value})
    assert key not in Recipe.from_dict({**SMALL, **without}).to_dict()
    assert Recipe.from_dict({**SMALL, **company, key: value}).to_dict()[key] == value


def test_every_recipe_is_made_for_a_model_that_has_a_name():
    assert sorted(name for names in MADE_FOR.values() for name in names) == recipe_names()
    assert recipes_for("var-d30")[0] == recipes_for("var_d30")[0] == "variant-d30"
    with pytest.raises(InputError, match="no recipe is made for var-d20: name one with --recipe"):
        recipes_for("var-d20")


def test_two_numbers_are_a_range_with_or_without_brackets():
    for text in ("cfg=1,3", "cfg=[1, 3]"):
        assert load_recipe("digits", [text]).cfg == (1.0, 3.0)
    assert load_recipe("digits", ["cfg=2"]).cfg == 2.0
    assert load_recipe("digits", ["layers=sensitivity"]).layers == "sensitivity"
    assert load_recipe("digits", ["depths=8,4", "depth_probability={8: 1, 4: 1}"]).depths == (8, 4)


def test_a_loss_by_name_is_a_weight_of_one():
    recipe = Recipe.from_dict({**SMALL, **TAUGHT})
    assert recipe.loss == {"kl": 1.0}
    assert load_recipe("digits-guided", ["loss={kl: 0.5, cross_entropy: 0.5}"]).loss == {
        "kl": 0.5,
        "cross_entropy": 0.5,
    }


def test_what_says_only_how_the_machine_is_used_is_named_once():
    names = {
        "accumulation",
        "activation_checkpointing",
        "checkpoint_every",
        "holdout_every",
        "together",
        "origin",
        "machine",
    }
    names |= {"parallel", "workers", "keep", "max_bad_steps", "compile", "tracker", "samples_every"}
    assert machine_fields() == names


def test_a_file_is_read_and_floats_without_a_dot_are_floats(tmp_path):
    path = write(
        tmp_path, "name: mine\ndepths: [4, 2]\nbridge: 1\nepochs_full: 1\nlearning_rate: 1e-6\nweight_decay: 1\n"
    )
    recipe = load_recipe(path)
    assert recipe.learning_rate == 1e-6
    assert isinstance(recipe.weight_decay, float)
    assert load_recipe(str(path)) == recipe


def test_a_name_is_not_shadowed_by_a_directory(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits").name == "digits"


def test_settings_override_the_file():
    settings = [
        "learning_rate=1e-5",
        "depths=8, 4",
        "dtype=bfloat16",
        "activation_checkpointing=true",
        "betas=[0.8,0.9]",
    ]
    recipe = load_recipe("variant-digits", settings)
    assert (recipe.learning_rate, recipe.depths, recipe.dtype) == (1e-5, (8, 4), "bfloat16")
    assert recipe.activation_checkpointing is True
    assert recipe.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1e-5}, "unknown key 'learning_rat': did you mean learning_rate?"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({3: 1}, "unknown key 3"),
        ({"bridge": "two"}, "bridge must be a whole number, not 'two'"),
        ({"views": "many"}, "views must be a whole number, or epochs: one for each epoch, not 'many'"),
        ({"views": 1.5}, "views must be a whole number, or epochs: one for each epoch, not 1.5"),
        ({"views": 300}, "views must be from 1 to 256, not 300"),
        ({"views": "epochs", "epochs_full": 300}, "views: epochs of"),
        ({"bridge": True}, "bridge must be a whole number, not True"),
        ({"bridge": 2.5}, "bridge must be a whole number, not 2.5"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"learning_rate": [1]}, "learning_rate must be a number"),
        ({"learning_rate": 0}, "learning_rate must be more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, not inf"),
        ({"activation_checkpointing": 1}, "activation_checkpointing must be true or false"),
        ({"name": None}, "name must be text"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, not 'float16'"),
        ({"depths": 4}, "depths must be a list such as"),
        ({"depths": ["4"]}, "depths must be a whole number, not '4'"),
        ({"depths": []}, "depths must run from large to small"),
        ({"depths": [2, 4]}, "depths must run from large to small"),
        ({"depths": [4, 1]}, "depths must be at least 2, not 1"),
        ({"betas": [0.9]}, "betas must be a list such as [0.9, 0.95]"),
        ({"p_start": 1.2}, "p_start must be from 0 to 1, not 1.2"),
        ({"epochs_full": -1}, "epochs_full must be at least 0, not -1"),
        ({"epochs_subnet": 0}, "nothing to train"),
        ({"epochs": 2}, "epochs goes with depth_probability"),
        ({**DRAWN, "epochs_full": 1}, "leave out epochs_full"),
        ({**DRAWN, "epochs": 0}, "the run has epochs, at least 1"),
        ({**DRAWN, "depth_probability": {3: 1}}, "depth_probability names 3, which is none of the depths: full, 4, 2"),
        ({**DRAWN, "depth_probability": {"half": 1}}, "depth_probability names half"),
        ({**DRAWN, "depth_probability": {4: 1.5}}, "depth_probability must be from 0 to 1, not 1.5"),
        ({**DRAWN, "depth_probability": {4: -1}}, "depth_probability must be from 0 to 1, not -1"),
        ({**DRAWN, "depth_probability": {4: float("nan")}}, "depth_probability must be a finite number, not nan"),
        ({**DRAWN, "depth_probability": {4: 0.5, "4": 1}}, "depth_probability has a key twice: 4, 4"),
        (
            {**DRAWN, "depth_probability": {4: "often"}},
            "depth_probability must be a probability for each depth, such as {full: 0.25",
        ),
        ({**DRAWN, "depth_probability": {4: 0, 2: 0}}, "depth_probability is 0 for every depth"),
        ({**DRAWN, "depth_probability": {}}, "depth_probability is 0 for every depth"),
        (
            {**DRAWN, "depth_probability": {"full": 1, 4: 1}},
            "depth_probability leaves out 2, which is one of the depths",
        ),
        (
            {**DRAWN, "depth_probability": 0.5},
            "depth_probability must be a probability for each depth, such as {full: 0.25",
        ),
        ({"loss": "hinge"}, "loss must be cross_entropy or kl, or a weight for each, not 'hinge'"),
        ({"loss": {"kl": 0}}, "loss gives every kind a weight of 0"),
        ({"loss": 3}, "loss must be cross_entropy or kl, or a weight for each, not 3"),
        ({"loss": ["kl"]}, "loss must be cross_entropy or kl, or a weight for each, not ['kl']"),
        ({"loss": "kl"}, "the loss kl and a teacher go together"),
        ({"teacher": "frozen"}, "the loss kl and a teacher go together"),
        ({"teacher": "mine"}, "teacher must be none or frozen, not 'mine'"),
        ({**TAUGHT, "guidance": "none", "cfg": 1.5}, "set teacher: frozen, loss: kl and label_drop: 0"),
        ({**NONE, "cfg": 1.5}, "set teacher: frozen, loss: kl and label_drop: 0"),
        ({**TAUGHT, "guidance": "none", "label_drop": 0}, "guidance: none and cfg, what is distilled, go together"),
        ({**TAUGHT, "cfg": [1, 3]}, "guidance: none and cfg, what is distilled, go together"),
        (
            {**TAUGHT, **NONE, "cfg": [3, 1]},
            "recipe: cfg must be a number from -1000 to 1000, or two",
        ),
        ({**TAUGHT, **NONE, "cfg": [1, 1]}, "or two of these, the smaller first"),
        (
            {**TAUGHT, **NONE, "cfg": [1]},
            "cfg must be a number, or two as a range, such as",
        ),
        (
            {**TAUGHT, **NONE, "cfg": [0, float("inf")]},
            "recipe: cfg must be a number from -1000 to 1000, or two",
        ),
        (
            {**TAUGHT, **NONE, "cfg": "strong"},
            "or two as a range, such as [0.5, 3], not 'strong'",
        ),
        (
            {"layers": "nearest"},
            "layers must be equidistant, sensitivity, or layers",
        ),
        ({"layers": [[0, 1, 2, 5]]}, "layers has 1 lists, of 4 layers, but depths are 4, 2"),
        ({"layers": [[0, 2, 1, 5], [0, 5]]}, "each list of layers must ascend"),
        ({"layers": [0, 5]}, "or layers for each depth, such as [[0, 9, 29], [0, 29]], not [0, 5]"),
        ({"layers": 3}, "layers must be equidistant, sensitivity, or layers for each depth"),
        ({"layers": []}, "layers has 0 lists, of no layers, but depths are 4, 2"),
        ({"teacher_top": 8}, "teacher_logits: stored and teacher_top go together"),
        ({**TAUGHT, "teacher_logits": "stored"}, "teacher_logits: stored and teacher_top go together"),
        ({"teacher_logits": "stored", "teacher_top": 8}, "teacher_logits goes with teacher"),
        ({"betas": [0.9, 1]}, "betas must be from 0 to below 1, not 1"),
        ({"holdout": 0.9}, "holdout must be from 0 to 0.5, not 0.9"),
        ({"origin": {"rumour": ["depths"]}}, "origin must be published, embedded, guess, changed, not 'rumour'"),
        ({"machine": "7 y"}, "recipe: machine '7 y': a memory of '7 y' is not understood"),
        ({"machine": "two"}, "recipe: machine 'two'"),
        ({"origin": {"guess": ["depth"]}}, "origin names 'depth', which is no key of a recipe"),
        ({"batch_size": 10, "accumulation": 3}, "batch_size 10 does not divide into 3 passes"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, not 0"),
    ],
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(InputError) as error:
        Recipe.from_dict({**SMALL, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_keys_are_named():
    with pytest.raises(InputError, match="lacks depths, bridge"):
        Recipe.from_dict({"name": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1,\nbridge: 2", "not YAML, line 2"),
        ("- 1\n- 2\n", "a recipe is a list of `key: value` lines"),
        ("", "a recipe is a list of `key: value` lines"),
        ("name: 2020-99-99", "not YAML"),
        ("name: mine\nbridge: 2\nbridge: 3", "not YAML, line 3: the key bridge stands there twice"),
        ("depth_probability: {16: 0.5, '16': 1}\nbridge: 2", "not YAML, line 1: the key 16 stands there twice"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_recipe(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="could not be read"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="could not be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        load_recipe(tmp_path / "binary.yaml")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"no recipe is named 'digit' .*: did you mean digits\?"):
        load_recipe("digit")


def test_views_may_be_as_many_as_epochs():
    assert load_recipe("variant-d30", ["views=epochs"]).num_views == 30
    assert load_recipe("digits", ["views=epochs", "epochs=6"]).num_views == 6
    assert load_recipe("digits", ["views=4"]).num_views == 4


@pytest.mark.parametrize("setting", ["learning_rate", "=3", "depths=[1", "depth_probability={16: 1, 16: 0.5}"])
def test_a_malformed_setting_is_refused(setting):
    with pytest.raises(InputError, match="--set"):
        load_recipe("digits", [setting])


def test_copy_never_overwrites(tmp_path):
    path = copy_recipe("digits", tmp_path)
    assert path == tmp_path / "digits.yaml"
    assert path.read_text() == recipe_text("digits")
    path.write_text("mine")
    with pytest.raises(InputError, match="stays as it is"):
        copy_recipe("digits", tmp_path)
    assert path.read_text() == "mine"
    assert copy_recipe("digits", tmp_path / "other.yaml").name == "other.yaml"
    with pytest.raises(InputError, match="no such directory"):
        copy_recipe("digits", tmp_path / "none" / "other.yaml")
