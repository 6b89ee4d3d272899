"""Memory of one pass of a device, by arithmetic: what it holds at each moment that can be the fullest.

The tensors are counted that the operators of `Block.forward`, `Objective.measure` and their backward passes keep or
make; what a kernel needs inside is not in it. tests/test_budget.py holds it against what they allocate.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import Together
from varcompress.training.optimizer import FLOAT32, muon_matrices
from varcompress.training.recipe import Recipe

BFLOAT16, INT64 = 2, 8
NODE = 8  # devices of a node, as they are usually built
Bytes = dict[str, int]


def shards_of(recipe: Recipe, devices: int) -> int:
    """Devices that share one copy of the weights, gradients, moments and the teacher: those of a node."""
    return min(devices, NODE) if recipe.parallel == "fsdp" else 1


def parameter_count(model: ElasticVAR, recipe: Recipe) -> int:
    """Weights that are trained, those of the input for a range of cfg included."""
    return sum(p.numel() for p in model.var.parameters()) + sum(added(model, recipe))


def added(model: ElasticVAR, recipe: Recipe) -> tuple[int, ...]:
    """Numbers of each parameter that a range of cfg adds: two linear layers, of one input and of the width."""
    width, config = model.var.config.width, model.var.config
    return (width, width, width**2, width) if isinstance(recipe.cfg, tuple) and not config.cfg_input else ()


class Pass:
    """What one pass of a device holds beyond what stays between steps, at each moment that can be the fullest."""

    def __init__(
        self, model: ElasticVAR, recipe: Recipe, together: Together, devices: int, *, accumulated: bool
    ) -> None:
        self.model, self.recipe, self.together, self.config = model, recipe, together, model.var.config
        self.images, self.shards = recipe.pass_size(devices), shards_of(recipe, devices)
        self.devices = devices
        self.element = BFLOAT16 if recipe.dtype == "bfloat16" else FLOAT32
        self.accumulated = accumulated
        self.logits = self.images * sum(together.lengths)  # tokens whose logits are computed
        self.largest = self.images * max(together.lengths)  # of one piece
        config = self.config
        self.block = sum(p.numel() for p in model.var.blocks[0].parameters())
        self.rest = parameter_count(model, recipe) - config.depth * self.block

    # Everything below is bytes. A residual is float32 whatever the arithmetic is in, because the embeddings are.

    def residual(self, tokens: int) -> int:
        return FLOAT32 * tokens * self.config.width

    def tokens(self, layer: int) -> int:
        return self.images * sum(self.together.seen(layer))

    def block_saved(self, layer: int) -> int:
        """What a layer keeps for its backward pass, its input included."""
        tokens, e = self.tokens(layer), self.element
        cast = 2 * FLOAT32 if e != FLOAT32 else 0  # queries and keys in float32, which are normalised so
        # input, normalised, modulated, the three projections, normalised queries before their temperature, queries and
        # keys after, what attention read, the branch
        attention = FLOAT32 * 2 + e + 3 * e + cast + FLOAT32 + 2 * e + e + e
        feed_forward = FLOAT32 * 2 + e + e  # the same of the MLP, but for its hidden layer
        per_head = 4 * FLOAT32 + FLOAT32  # norms of queries and keys, twice, and attention's normaliser
        per_token = (attention + feed_forward) * self.config.width + 2 * e * self.config.hidden
        per_token += per_head * self.config.heads + 4 * FLOAT32  # mean and deviation of two LayerNorms
        return tokens * per_token + self.mask(layer) + 12 * self.images * self.config.width * e + self.copies

    def mask(self, layer: int) -> int:
        """The mask as attention adds it."""
        return sum(self.together.seen(layer)) ** 2 * self.element

    @property
    def copies(self) -> int:
        """Weights of a layer in the dtype of the arithmetic, where that is not their own."""
        return self.block * BFLOAT16 if self.element == BFLOAT16 else 0

    def block_kept(self, layer: int) -> int:
        """What stays of a layer from its forward pass to its backward pass."""
        return self.residual(self.tokens(layer)) if self.recipe.activation_checkpointing else self.block_saved(layer)

    def block_backward(self, layer: int) -> int:
        """What the backward pass of a layer makes beside what was kept: where the MLP's output weight has its turn.

        The gradients of the residual, of the branch (whose values are gone by then), of the hidden layer, and of the
        weight, in both dtypes.
        """
        tokens, e, config = self.tokens(layer), self.element, self.config
        weight = config.width * config.hidden * (FLOAT32 + (e if e != FLOAT32 else 0))
        return self.residual(max(tokens, self.logits)) + tokens * e * config.hidden + weight

    def gradients(self, done: list[int] | None = None) -> int:
        """Gradients when the layers of `done` have theirs; all of them in a pass that is not the step's first."""
        layers = self.together.layers if done is None else done
        everything = self.accumulated or done is None
        return FLOAT32 * (self.block * len(layers) + (self.rest if everything else self.head)) // self.shards

    @property
    def head(self) -> int:
        return self.config.vocab * (self.config.width + 1) + 2 * self.config.width * (self.config.width + 1)

    @cached_property
    def buffers(self) -> int:
        """Masks of a pass, what it is given, and of several devices the gathered weights of two layers and the rest."""
        config, images = self.config, self.images
        longest = max(sum(self.together.seen(layer)) for layer in self.together.layers)
        held = config.tokens**2 + (longest**2 if len(self.together.lengths) > 1 else 0)
        given = images * config.tokens * (config.z_channels * FLOAT32 + 2 * INT64)
        gathered = (2 * self.block + self.rest) * FLOAT32 if self.devices > 1 else 0
        return held + given + gathered

    # -- moments --

    def moments(self) -> Iterator[Bytes]:
        """Parts at each moment."""
        layers, before = self.together.layers, self.gradients() if self.accumulated else 0
        kept = {layer: self.block_kept(layer) for layer in layers}
        answer = self.answer()
        if self.teacher_rows:
            yield self._moment(before, self.teacher_activations(), self.teacher_logits())
        # the last layer is through
        residuals = 2 * self.residual(self.logits) + self.residual(self.images * self.config.tokens)
        unit = self.logits * self.config.vocab
        whole = sum(kept.values()) + self.head_saved()
        in_half = self.element * unit if self.element != FLOAT32 else 0
        yield self._moment(before, whole + residuals, answer + in_half + FLOAT32 * unit)
        yield self._moment(before, whole, answer + self.loss_forward())
        yield self._moment(before, whole, answer + self.loss_backward())
        done: list[int] = []
        for layer in reversed(layers):
            earlier = sum(kept[other] for other in layers if other < layer)
            now = self.block_saved(layer) + self.block_backward(layer)
            gradients = before or self.gradients(done)
            yield self._moment(gradients, earlier + now, answer)
            done.append(layer)
        yield self._moment(self.gradients(), 0, 0, buffers=self.optimizer_buffers())

    def _moment(self, gradients: int, activations: int, logits: int, buffers: int | None = None) -> Bytes:
        buffers = self.buffers if buffers is None else buffers
        return {"gradients": gradients, "activations": activations, "logits and loss": logits, "buffers": buffers}

    def head_saved(self) -> int:
        """The head's input, normalised, modulated."""
        per_token = 2 * FLOAT32 + self.element
        cast = self.rest * BFLOAT16 if self.element == BFLOAT16 else 0
        return self.logits * (per_token * self.config.width + 2 * FLOAT32) + cast

    def answer(self) -> int:
        """What the teacher has said, for the whole pass."""
        tokens, recipe = self.images * self.config.tokens, self.recipe
        if recipe.teacher == "none":
            return 0
        if recipe.teacher_logits == "stored":
            top = min(recipe.teacher_top, self.config.vocab)
            return tokens * (FLOAT32 * (top + 1) + INT64 * top)
        return FLOAT32 * tokens * self.config.vocab

    @property
    def teacher_rows(self) -> int:
        """Images that a live teacher runs at a time, twice as many where it is guided."""
        recipe = self.recipe
        live = recipe.teacher == "frozen" and recipe.teacher_logits == "live"
        return self.images * (1 + (recipe.cfg is not None)) if live else 0

    def teacher_activations(self) -> int:
        """A layer of the teacher, of which nothing is kept: the residual, and what attention or the MLP makes of it."""
        tokens, e, config = self.teacher_rows * self.config.tokens, self.element, self.config
        return tokens * (FLOAT32 * 2 * config.width + max((4 * e + 2 * FLOAT32) * config.width, e * config.hidden))

    def teacher_logits(self) -> int:
        """Its logits in both halves, the guided ones and their logarithms."""
        unit = FLOAT32 * self.images * self.config.tokens * self.config.vocab
        return unit * (4 if self.recipe.cfg is not None else 2)

    def loss_forward(self) -> int:
        """Logits, log-probabilities and what the losses keep, and two more of the piece that is at its turn."""
        unit, piece = (FLOAT32 * tokens * self.config.vocab for tokens in (self.logits, self.largest))
        return 3 * unit + 2 * piece if self.recipe.loss.get("kl") else 2 * unit

    def loss_backward(self) -> int:
        """Of the first piece all is kept, and its gradients are made; then all gradients, which are put together."""
        unit, piece = (FLOAT32 * tokens * self.config.vocab for tokens in (self.logits, self.largest))
        kept = 2 if self.recipe.loss.get("kl") else 1
        both = 2 * unit
        return max(kept * unit + 2 * piece, both + (self.element * self.logits * self.config.vocab))

    def optimizer_buffers(self) -> int:
        """Muon's copies of the largest matrix: its update, and in bfloat16 the iterations' terms."""
        muon = muon_matrices(self.model.var).values() if self.recipe.optimizer == "muon" else ()
        largest = max((matrix.numel() for matrix in muon), default=0)
        return largest * (FLOAT32 + 3 * BFLOAT16)
