"""The arithmetic of a run's cost against what the code allocates and computes, and what a plan says of the recipes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.benchmarks.step import FOLDER
from tests.conftest import random_model
from varcompress.cli.distill import GPU_NAMES
from varcompress.cost import describe
from varcompress.data.tokens import Samples, TokenData
from varcompress.distributed import Ranks
from varcompress.errors import InputError
from varcompress.loading import load, official_tokenizer, outline
from varcompress.memory import LiveTensors
from varcompress.models.elastic import ElasticVAR
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, add_cfg_input
from varcompress.progress import silent
from varcompress.schedule import Together
from varcompress.training import budget, distill
from varcompress.training.budget import GB, GPUS, cheapest_change, forward_flops, memory, optimizer_bytes, schedules_of
from varcompress.training.heldout import measure_heldout
from varcompress.training.loop import subnets_of, teacher_of
from varcompress.training.objective import Objective
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import FULL, MADE_FOR, Machine, Recipe, load_recipe, recipe_names
from varcompress.training.sensitivity import losses_of
from varcompress.training.strategy import plan
from varcompress.training.teacher import StoredTeacher

CLOSE = 1 / 10
SMALL = Recipe(name="small", depths=(3, 2), bridge=2, epochs_subnet=1, batch_size=16, dtype="float32", label_drop=0.0)
DRAWN = {"epochs_subnet": 0, "epochs": 1, "depth_probability": {"full": 0.5, "3": 0.5, "2": 1.0}}
TAUGHT = {"teacher": "frozen", "loss": {"kl": 1.0}}
GUIDED = {**TAUGHT, "guidance": "none", "cfg": 1.5}

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**shape) -> ElasticVAR:
    model = random_model(**{"depth": 4, "width": 64, "patch_nums": (1, 2, 3, 4), "vocab": 64} | shape)
    model.tokenizer.requires_grad_(False)
    return model


def a_pass(model: ElasticVAR, recipe: Recipe, images: int) -> Samples:
    config = model.var.config
    return Samples(
        torch.arange(images) % config.classes, torch.randint(config.vocab, (images, config.tokens)), None, None
    )


def fullest(recipe: Recipe) -> tuple:
    """The depths of the fullest step: all, where they may meet in one."""
    return (FULL, *recipe.depths) if recipe.depth_probability else (FULL,)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation_checkpointing": True},
        {"optimizer": "muon"},
        {"accumulation": 4},
        {"accumulation": 4, "activation_checkpointing": True},
        {"dtype": "bfloat16"},
        DRAWN,
        {**DRAWN, "together": False},
        {**DRAWN, **TAUGHT, "optimizer": "muon", "activation_checkpointing": True, "accumulation": 2},
        {**DRAWN, **TAUGHT, "loss": {"kl": 0.5, "cross_entropy": 0.5}},
        {**DRAWN, **GUIDED, "teacher_dtype": "bfloat16", "dtype": "bfloat16"},
        {**GUIDED, "cfg": (0.5, 3.0), "activation_checkpointing": True},
        {**TAUGHT, "optimizer": "adamw8bit"},
    ],
    ids=str,
)
@torch.compiler.set_stance("force_eager")
def test_predicted_memory_is_what_a_step_holds_and_makes(change):
    """All tensors of the second step, whose moments are there, of a model on the CPU."""
    recipe, model = replace(SMALL, **change), small_model()
    predicted = memory(model, recipe)
    teacher = teacher_of(model, recipe)
    if isinstance(recipe.cfg, tuple):
        add_cfg_input(model.var)
    objective, optimizer = Objective(model, recipe, teacher), optimizer_of(model.var, recipe)
    model.bridge = recipe.bridge
    samples, schedules = a_pass(model, recipe, recipe.pass_size()), schedules_of(model, recipe, fullest(recipe))

    def step() -> None:
        for _ in range(recipe.accumulation):
            objective.backward(samples, slice(0, recipe.pass_size()), 1, schedules)
        optimizer.step(1e-6)

    step()
    held = {
        "parameters": tuple(model.var.parameters()),
        "moments": [m for p in model.var.parameters() for m in optimizer.state(p).values() if m.ndim],
        "teacher": tuple(teacher._var.parameters()) if teacher else (),
        "tokenizer": (*model.tokenizer.parameters(), *model.tokenizer.buffers()),
    }
    held = {part: sum(t.nbytes for t in tensors) for part, tensors in held.items() if tensors}
    assert {part: predicted[part] for part in held} == pytest.approx(held, rel=1e-3)
    with LiveTensors() as tensors:
        step()
    grown = sum(size for part, size in predicted.items() if part not in held)
    assert grown == pytest.approx(tensors.peak_bytes, rel=CLOSE)


def test_predicted_memory_of_stored_answers(tmp_path):
    """They are on the host but for those of a pass."""
    recipe, model = replace(SMALL, **TAUGHT, teacher_logits="stored", teacher_top=8), small_model()
    config, count = model.var.config, recipe.batch_size
    tokens = np.random.default_rng(0).integers(config.vocab, size=(count, 1, config.tokens)).astype(np.uint16)
    data = TokenData(tokens, np.arange(count), np.arange(count) % config.classes)
    objective = Objective(model, recipe, teacher_of(model, recipe))
    stored = StoredTeacher(tmp_path, data, config, top=8, digest="", settings={"label_drop": False})
    stored.create()
    stored.compute(objective.teacher_says, 0, 1, silent, at_a_time=count)
    stored.open()
    objective.teacher = stored
    samples, schedules = data.samples(data.rows, np.zeros(count, dtype=int)), [model.schedule(FULL)]
    with LiveTensors() as tensors:
        objective.backward(samples, slice(0, count), 1, schedules)
    parts = memory(model, recipe)
    assert "teacher" not in parts
    grown = sum(parts.get(part, 0) for part in ("gradients", "activations", "logits and loss", "buffers"))
    assert grown == pytest.approx(tensors.peak_bytes, rel=CLOSE)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.npy"))
    assert budget.disk(model, recipe, count)["teacher's logits"] == pytest.approx(files, rel=0.03)  # and their heads


def without_values(model: ElasticVAR, recipe: Recipe) -> tuple[ElasticVAR, Objective, FakeTensorMode]:
    """The objective of a model whose tensors have shapes and no values, on the CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    teacher = teacher_of(model, recipe)
    with mode:
        for part in (model, *([teacher._var] if teacher else [])):
            part.to_empty(device="cpu")
    model.tokenizer.requires_grad_(False)
    return model, Objective(model, recipe, teacher), mode


@pytest.mark.parametrize(
    ("name", "model", "settings", "images"),
    [
        ("variant-d30", "var-d30", [], 32),
        ("variant-d16", "var-d16", ["activation_checkpointing=false"], 4),
        ("distil-d30-unguided", "var-d30", [], 16),
        ("variant-d36-512", "var-d36", [], 16),
    ],
)
def test_predicted_memory_of_official_shapes(name, model, settings, images):
    """bfloat16 as autocast has it, the pass that finds no gradients."""
    recipe = load_recipe(name, [*settings, f"batch_size={images}", "accumulation=1"])
    model, objective, mode = without_values(outline(model), recipe)
    samples = Samples(
        torch.zeros(images, dtype=torch.int64), torch.zeros(images, model.var.config.tokens).long(), None, None
    )
    with mode, LiveTensors() as tensors:
        objective.backward(samples, slice(0, images), 1, schedules_of(model, recipe, fullest(recipe)))
    predicted = memory(model, recipe)
    made = sum(predicted.get(part, 0) for part in ("gradients", "activations", "logits and loss", "buffers"))
    assert made == pytest.approx(tensors.peak_bytes, rel=CLOSE)


def test_predicted_memory_of_encoding():
    """Before the first step, images become tokens: with few of them in a pass that is the fullest moment."""
    model = outline("var-d16")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.tokenizer.to_empty(device="cpu")
        pixels = torch.zeros(budget.CHUNK, 3, 256, 256)
        with LiveTensors() as tensors:
            model.tokenizer.encode(pixels)
    assert budget._encoding(model)["encoder"] == pytest.approx(tensors.peak_bytes + pixels.nbytes, rel=CLOSE)
    assert "encoder" in memory(outline("var-d16"), load_recipe("variant-d16", ["batch_size=8", "accumulation=8"]))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_predicted_memory_is_what_a_gpu_measured(path):
    """Each pass of docs/benchmarks/step, of which every one was the first of its step."""
    content = json.loads(path.read_text(encoding="utf-8"))
    model = outline(f"var-{content['size']}")
    for result in content["results"]:
        recipe = load_recipe(result["recipe"], content["set"])
        assert sum(p.numel() for p in model.var.parameters()) * 4 == result["weights_bytes"]
        assert optimizer_bytes(model, recipe) == pytest.approx(result["state_bytes"], rel=1e-6)  # and step counts
        for row in result["passes"]:
            parts = memory(model, recipe, devices=content["devices"], depths=tuple(row["depths"]), first=True)
            assert sum(parts.values()) == pytest.approx(row["peak_bytes"], rel=CLOSE)


def test_what_is_sharded_is_divided():
    model, recipe = small_model(), replace(SMALL, **TAUGHT)
    alone, shared = (
        memory(model, replace(recipe, batch_size=4)),
        memory(model, replace(recipe, parallel="fsdp"), devices=4),
    )
    for part in ("parameters", "moments", "teacher"):
        assert shared[part] == alone[part] // 4
    assert shared["tokenizer"] == alone["tokenizer"]


# -- work -----------------------------------------------------------------------------------------


def attention_flops(q, k, v, *_, out_shape=None, **__):
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad, q, k, v, *_, out_shape=None, **__):
    return 2 * sdpa_flop_count(q, k, v)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize(
    "change", [{**DRAWN, **GUIDED}, {**DRAWN, "together": False, "activation_checkpointing": True}]
)
def test_flops_are_those_that_a_step_computes(change, shared_aln):
    recipe = replace(SMALL, **change)
    model = small_model(shared_aln=shared_aln)
    objective = Objective(model, recipe, teacher_of(model, recipe))
    samples, depths = a_pass(model, recipe, recipe.batch_size), fullest(recipe)
    counted = {ATTENTION: attention_flops, ATTENTION_BACKWARD: attention_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as flops:
        objective.backward(samples, slice(0, recipe.batch_size), 1, schedules_of(model, recipe, depths))
    predicted = sum(budget.step_flops(model, recipe, depths).values())
    assert predicted == pytest.approx(flops.get_total_flops(), rel=TOKENIZER_PRODUCTS)


def small_data(model: ElasticVAR, images: int) -> TokenData:
    config = model.var.config
    tokens = np.random.default_rng(0).integers(config.vocab, size=(images, 1, config.tokens)).astype(np.uint16)
    return TokenData(tokens, np.arange(images), np.arange(images) % config.classes)


TOKENIZER_PRODUCTS = 0.03  # of what a pass is given, which are not counted


@pytest.mark.parametrize("change", [{}, TAUGHT, {**DRAWN, **GUIDED}])
def test_flops_of_the_images_held_out(change):
    """20 of 100, in passes of 16 and 4, after every third of eight steps and the last."""
    recipe, model = replace(SMALL, **change, holdout=0.2, holdout_every=3), small_model()
    model.bridge, model.depths = recipe.bridge, recipe.depths
    _, heldout = small_data(model, 100).split(recipe.held_out(100))
    objective = Objective(model, recipe, teacher_of(model, recipe))
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: attention_flops}) as flops:
        measure_heldout(objective, heldout, Ranks())
    steps = plan(replace(recipe, **({"epochs": 2} if recipe.epochs else {"epochs_subnet": 2})), 4)
    found = budget.heldout_flops(model, recipe, steps, 100, 1)
    assert found == pytest.approx(3 * flops.get_total_flops(), rel=TOKENIZER_PRODUCTS)
    assert budget.run_flops(model, recipe, steps, 100, 1)["held-out images"] == found
    # of three devices each runs passes of 5, 4 in all: two of them run the last again, as they share its weights
    shared = replace(recipe, batch_size=15)
    assert budget.heldout_flops(model, shared, steps, 100, 3) / found == pytest.approx((20 + 2 * 5) / 20)
    if recipe.teacher != "none":  # whose stored answers are read
        stored = replace(recipe, teacher_logits="stored", teacher_top=4)
        assert budget.heldout_flops(model, stored, steps, 100, 1) < found
    assert budget.heldout_flops(model, replace(SMALL, **change), steps, 100, 1) == 0


@pytest.mark.parametrize("change", [{}, {**DRAWN, **GUIDED}])
def test_flops_of_choosing_layers_by_sensitivity(change):
    recipe, model = replace(SMALL, **change, layers="sensitivity"), small_model(depth=6)
    model.bridge, model.depths = recipe.bridge, recipe.depths
    objective, data = Objective(model, recipe, teacher_of(model, recipe)), small_data(model, 70)
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: attention_flops}) as flops:
        subnets_of(objective, data, Ranks(), silent)
    found = budget.sensitivity_flops(model, recipe, 70)
    assert found == pytest.approx(flops.get_total_flops(), rel=TOKENIZER_PRODUCTS)
    steps = plan(recipe, 4)
    assert budget.run_flops(model, recipe, steps, 70, 1)["choice of layers"] == found
    assert "choice of layers" not in budget.run_flops(model, replace(SMALL, **change), steps, 70, 1)
    assert sum(losses_of(30, 2, 2).values()) == 406


def test_flops_of_muon():
    model = small_model(depth=2)
    recipe = replace(SMALL, optimizer="muon", depths=(2,))
    optimizer = optimizer_of(model.var, recipe)
    for parameter in model.var.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as flops:
        optimizer.step(1e-3)
    assert flops.get_total_flops() == budget.muon_flops(model)


def test_a_full_pass_of_d30_by_hand():
    """Sixty layers' worth of matrices, four products of attention, and the head: 1.92 TFLOP an image."""
    model = outline("var-d30")
    layers, rest = forward_flops(model.var.config, Together((model.schedule(FULL),)), 1)
    assert layers == pytest.approx(30 * (680 * 2 * 12 * 1920**2 + 4 * 680**2 * 1920 + 12 * 1920**2))
    assert rest == pytest.approx(2 * 680 * 1920 * 4096, rel=0.02)


def test_the_default_utilisation_is_below_what_an_h200_reached():
    content = json.loads((FOLDER / "h200-d30.json").read_text(encoding="utf-8"))
    model = outline("var-d30")
    for result in content["results"]:
        recipe = load_recipe(result["recipe"])
        work = sum(sum(budget.step_flops(model, recipe, tuple(p["depths"])).values()) for p in result["passes"])
        seconds = sum(p["pass_ms"] for p in result["passes"]) / 1e3
        reached = work / (content["devices"] * recipe.accumulation) / seconds / 990e12
        assert budget.UTILISATION < reached < budget.UTILISATION + 0.06
    full = result = content["results"][0]["passes"][0]
    work = sum(budget.step_flops(model, load_recipe("variant-d30"), (FULL,)).values()) / 8 / 4
    assert work / full["pass_ms"] * 1e3 / 990e12 == pytest.approx(0.28, abs=0.005)


# -- what fits ------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(limit=st.integers(1, 60), accumulation=st.sampled_from([1, 2, 4]))
def test_a_change_is_none_where_it_fits_and_makes_it_fit_where_it_does_not(limit, accumulation):
    model = outline("var-d16")
    recipe = load_recipe("distil-d30", ["depths=8,4,2", "depth_probability={full: 0.5, 8: 1, 4: 1, 2: 1}"])
    recipe = replace(recipe, batch_size=64, accumulation=accumulation, activation_checkpointing=False)
    change = cheapest_change(model, recipe, limit * GB, devices=2)
    fits = sum(memory(model, recipe, devices=2).values()) <= limit * GB
    assert (change == {}) == fits
    if change:
        assert sum(memory(model, replace(recipe, **change), devices=2).values()) <= limit * GB
        for key in change.keys() - {"teacher_logits", "teacher_top"}:  # of which none can be left out
            less = replace(recipe, **{k: v for k, v in change.items() if k != key})
            assert sum(memory(model, less, devices=2).values()) > limit * GB


def test_the_cheapest_change_leaves_what_is_learned_as_it_is():
    model, recipe = outline("var-d30"), load_recipe("variant-d30", ["activation_checkpointing=false"])
    assert cheapest_change(model, recipe, 80 * GB, devices=8) == {"accumulation": 8}
    assert cheapest_change(model, recipe, 24 * GB, devices=8) == {"accumulation": 32, "parallel": "fsdp"}
    assert cheapest_change(model, recipe, 38 * GB) == {"accumulation": 64, "activation_checkpointing": True}
    assert cheapest_change(model, recipe, 24 * GB)["optimizer"] == "adamw8bit"
    assert cheapest_change(model, recipe, 16 * GB) is None


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    model = small_model()
    recipe = replace(SMALL, batch_size=32)
    needed = sum(memory(model, recipe).values())
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(budget, "free_bytes", lambda: needed - held - 1)
    with pytest.raises(InputError, match=r"recipe small needs .* GB on a device.* --set accumulation=2$"):
        distill(copy.deepcopy(model), recipe, data=tmp_path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(budget, "free_bytes", lambda: needed)
    budget.check_memory(model, recipe, model.device)
    monkeypatch.setattr(budget, "free_bytes", lambda: None)
    budget.check_memory(model, recipe, model.device)
    monkeypatch.setattr(budget, "free_bytes", lambda: 0)
    with pytest.raises(InputError, match="use a device with more memory"):
        budget.check_memory(model, recipe, model.device)


# -- the recipes ----------------------------------------------------------------------------------

MODEL_OF = {name: model for model, names in MADE_FOR.items() for name in names}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_the_machine_that_it_is_made_for(name):
    recipe, model = load_recipe(name), MODEL_OF[name]
    machine = Machine.parse(recipe.machine)
    parts = memory(outline(model) or load(model, device="cpu"), recipe, devices=machine.devices)
    assert sum(parts.values()) < (machine.memory_bytes or GB)  # a CPU's is not named


@pytest.mark.parametrize("name", recipe_names())
def test_a_step_of_a_recipe_runs_on_its_model_made_narrow(name):
    recipe, named = load_recipe(name), outline(MODEL_OF[name]) or load(MODEL_OF[name], device="cpu")
    config = replace(named.var.config, width=64, heads=2, hidden=256, vocab=64, z_channels=8)
    small = replace(
        official_tokenizer(config.patch_nums), channels=32, channel_multipliers=(1, 1), vocab=64, z_channels=8
    )
    torch.manual_seed(0)
    model = ElasticVAR(VAR(config), VQVAE(small))
    model.tokenizer.requires_grad_(False)
    depths = (*recipe.depths[-2:],) if recipe.depth_probability else recipe.depths[-1:]
    objective, optimizer = Objective(model, recipe, teacher_of(model, recipe)), optimizer_of(model.var, recipe)
    before = copy.deepcopy(model.var.state_dict())
    losses = objective.backward(a_pass(model, recipe, 1), slice(0, 1), 1, schedules_of(model, recipe, depths))
    optimizer.step(recipe.learning_rate)
    assert objective.total(losses).isfinite()
    moved = {key for key, value in model.var.state_dict().items() if not torch.equal(value, before[key])}
    assert "blocks.0.attn.mat_qkv.weight" in moved or recipe.teacher != "none"


def test_a_machine_is_read():
    assert Machine.parse("8 x 80GB") == Machine(8, 80 * GB)
    assert Machine.parse("80 GB") == Machine(1, 80 * GB)
    assert Machine.parse("2x24GiB") == Machine(2, 24 * 2**30)
    assert Machine.parse("cpu") == Machine(1, None)
    for text in ("", "gpu", "x 80GB", "0 x 80GB", "8 x", "8 x 0GB", "-1 x 8GB", "80"):
        with pytest.raises(InputError, match="not understood: write"):
            Machine.parse(text)


# -- the command ----------------------------------------------------------------------------------


OFFICIAL = {"var-d16": 310.3, "var-d20": 600.9, "var-d24": 1033, "var-d30": 2010, "var-d36": 2354}  # M parameters


@pytest.fixture
def no_hub(monkeypatch):
    """A plan that asks the Hub fails."""
    monkeypatch.setattr("varcompress.loading._files", lambda *_: pytest.fail("it asked the Hub"))


def test_a_plan_needs_no_weights(run, no_hub):
    code, out, err = run("distill", "var-d30", "--plan", "--json")
    result = json.loads(out)
    assert (code, err.splitlines()[0][:18]) == (0, "recipe variant-d30")
    assert (result["kind"], result["steps"], result["devices"], result["fits"]) == ("plan", 37530, 8, True)
    assert result["memory_bytes"] == sum(result["memory"].values())
    assert result["seconds"] == pytest.approx(sum(result["flops"].values()) / (8 * 989e12 * 0.2))
    assert result["tokens"] == 37530 * 1024 * 680


def test_a_plan_says_what_to_change(run, no_hub):
    arguments = ["distill", "var-d30", "--plan", "--recipe", "variant-d30", "--devices", "1", "--gpu", "l40s"]
    code, out, _ = run(*arguments, "--images", "50000", "--utilisation", "0.3")
    text = " ".join(out.split())
    assert code == 0
    assert "not in 48.0 GB: it does with --set accumulation=32" in text
    assert "at 30% of 362 TFLOP/s" in text
    assert "50,000 images" in text
    text = " ".join(
        run("distill", "var-d30", "--plan", "--recipe=distil-d30", "--devices=1", "--gpu=rtx4090")[1].split()
    )
    assert "teacher_top=64 --set optimizer=adamw8bit, and 430 GB more on the disk" in text  # of which logits are 450
    assert "whatever the recipe's keys" in " ".join(run(*arguments, "--device-memory", "16GB")[1].split())


def test_the_copy_of_a_state_is_what_the_processes_of_a_node_hold():
    model, state = outline("var-d30"), 3 * 8.04 * GB
    for how, devices, copies in (("ddp", 1, 1), ("ddp", 8, 8), ("ddp", 16, 8), ("fsdp", 8, 1), ("fsdp", 16, 1)):
        recipe = load_recipe("variant-d30", [f"parallel={how}"])
        assert budget.host_bytes(model, recipe, devices) == pytest.approx(copies * state, rel=1e-3)


def test_a_plan_of_the_embedded_model_counts_its_images(run):
    result = json.loads(run("distill", "digits", "--plan", "--json")[1])
    assert (result["images"], result["steps"], result["seconds"]) == (1797, 848, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices=2"], "--devices goes with --plan"),
        (["--gpu=h100"], "--gpu goes with --plan"),
        ([], "name the directory that becomes the elastic checkpoint: --out DIR"),
        (["--plan", "--gpu=gtx"], "gpu 'gtx' is unknown: use rtx3090, "),
        (["--plan", "--device-memory=24"], "a memory of '24' is not understood: write 24GB"),
        (["--plan", "--devices=3"], "batch_size 1024 does not divide into 3 processes"),
        (["--plan", "--images=100"], "batch_size 1024 is more than the 100 images there are"),
        (["--plan", "--set=depths=30,2"], "depths names 30, but the model has 30 layers"),
        (["--plan", "--set=machine=gpu"], "a memory of 'gpu' is not understood"),
    ],
)
def test_a_plan_of_bad_input_is_one_line(run, no_hub, options, message):
    code, out, err = run("distill", "var-d30", "--recipe", "variant-d30", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_inspect_needs_no_weights(run, no_hub):
    code, out, _ = run("inspect", "var-d36", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["image_size"], result["tokens"], result["shared_aln"]) == (512, 2240, True)
    millions = {size: sum(p.numel() for p in outline(size).var.parameters()) / 1e6 for size in OFFICIAL}
    assert millions == pytest.approx(OFFICIAL, rel=0.005)


def test_inspect_without_weights_says_what_it_says_with_them():
    """But for packed copies, which a model without weights has none of."""
    bare = outline("var-d16")
    full = copy.deepcopy(bare)
    full.to_empty(device="cpu")  # pages that nobody touches take no memory
    said, expected = (describe(model, ["full", "d2"]) for model in (bare, full))
    for result in (said, expected):
        for row in (*result["schedules"], *result["unguided"]):
            del row["peak_bytes"]
    assert said == expected


def test_gpus_are_named_once_more_where_help_prints_them():
    assert tuple(GPUS) == GPU_NAMES
