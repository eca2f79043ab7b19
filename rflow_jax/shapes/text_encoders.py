"""Training of the text encoders as a task: all that a text says can be read off their output by linear heads.

Each of T5's tokens says what the whole text says, and which token it is and of which noun: without the latter all
tokens of a text become alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from rflow_jax.errors import InputError
from rflow_jax.models.flops import encoder_flops, t5_flops
from rflow_jax.models.layers import Linear, abstract
from rflow_jax.models.text_encoders import ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder
from rflow_jax.parallel.mesh import put_batch, replicated, samples_along, traced_on
from rflow_jax.parallel.sharding import put_by, sharding_for
from rflow_jax.shapes.grammar import held_out_prompts
from rflow_jax.shapes.model import require_pipeline, save_pipeline
from rflow_jax.shapes.numbered_task import NumberedTask
from rflow_jax.shapes.text_config import ShapesTextRunConfig
from rflow_jax.shapes.text_table import (
    CLASSES,
    HEADS,
    OWN_HEADS,
    PROMPT_HEADS,
    TextCoder,
    TextTable,
    make_text_table,
    sample_text,
)
from rflow_jax.training.corrector.step import sample_keys
from rflow_jax.training.partition import on_host
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import MeanMetric, Metrics, StepMetrics, TrainState, compile_step, make_update
from rflow_jax.typing import Array, Bool, Float, Int, UInt32
from rflow_jax.weights.components import CLIP, T5, TRANSFORMER
from rflow_jax.weights.flux import StoredNetwork, defaults_of, describe
from rflow_jax.weights.hub import resolve
from rflow_jax.weights.loading import parameter_variables

HELD_OUT_SEED = 2**32  # of the reflections for validation: no run has it


class Told(NamedTuple):
    """Scores of the classes of each head, float32.

    Attributes:
        clip: from CLIP's vector of the prompt, of the heads of the prompt only.
        t5: from each of T5's tokens.
        own: from each of T5's tokens, of the color and the shape of its noun.
        token: from each of T5's tokens, which one it is.
    """

    clip: Float[Array, "b prompt_heads classes"]
    t5: Float[Array, "b t heads classes"]
    own: Float[Array, "b t 2 classes"]
    token: Float[Array, "b t vocabulary"]


class HeadedEncoders(nnx.Module):
    """Both text encoders, and linear heads that begin at zero and are of use in training only."""

    def __init__(self, clip: ClipTextConfig, t5: T5Config, *, rngs: nnx.Rngs):
        self.clip = ClipTextEncoder(clip, rngs=rngs)
        self.t5 = T5Encoder(t5, rngs=rngs)
        self.clip_heads = Linear(clip.hidden_size, len(PROMPT_HEADS) * CLASSES, rngs=rngs)
        self.t5_heads = Linear(t5.d_model, (len(HEADS) + len(OWN_HEADS)) * CLASSES, rngs=rngs)
        self.token_head = Linear(t5.d_model, t5.vocab_size, rngs=rngs)

    def __call__(self, clip_ids: Int[Array, "b c"], t5_ids: Int[Array, "b t"]) -> Told:
        """The scores; T5's padding takes part and tells as much as any token, since generation reads it too."""
        _, pooled = self.clip(clip_ids)
        clip = self.clip_heads(pooled[:, None].astype(jnp.float32))
        encoded = self.t5(t5_ids).astype(jnp.float32)
        t5 = self.t5_heads(encoded).reshape(*t5_ids.shape, -1, CLASSES)
        whole, own = t5[:, :, : len(HEADS)], t5[:, :, len(HEADS) :]
        return Told(clip.reshape(len(clip), -1, CLASSES), whole, own, self.token_head(encoded))


def merge_rounded(graph: nnx.GraphDef, trainable: nnx.State, dtype: Dtype) -> HeadedEncoders:
    """The network with its parameters rounded to the dtype that it computes in."""
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), trainable))


def all_right(scores: Float[Array, "*b heads classes"], targets: Int[Array, "*#b heads"]) -> Bool[Array, "*b"]:
    """Whether the highest score of every head is that of its target."""
    return jnp.all(jnp.argmax(scores, axis=-1) == targets, axis=-1)


def loss_of(network: HeadedEncoders, table: TextTable, keys: Array) -> tuple[Float[Array, ""], Metrics]:
    """The cross-entropies of CLIP's heads, and of T5's heads of texts, of nouns and of tokens; the mean of each.

    Args:
        keys: of the samples, [b]; they choose the text.
    """
    rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(table.targets)))(keys)
    clip_ids, t5_ids, targets, own = (jnp.asarray(part)[rows] for part in table)
    told = network(clip_ids, t5_ids)
    prompt, whole = targets[:, : len(PROMPT_HEADS)], jnp.broadcast_to(targets[:, None], told.t5.shape[:-1])
    entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = jnp.mean(entropy(told.clip, prompt)) + jnp.mean(entropy(told.t5, whole))
    loss += jnp.mean(entropy(told.own, own)) + jnp.mean(entropy(told.token, t5_ids))
    right = {"clip": all_right(told.clip, prompt), "t5": all_right(told.t5, whole), "own": all_right(told.own, own)}
    metrics = {
        name: MeanMetric(jnp.sum(one.astype(jnp.float32)), jnp.asarray(one.size, jnp.float32))
        for name, one in right.items()
    }
    return loss, metrics


class TextValidation:
    """Prompts that no picture is trained with, with reflections that are in no table."""

    def __init__(self, config: ShapesTextRunConfig, coder: TextCoder, graph: nnx.GraphDef, mesh: Mesh):
        self.every = config.validation.every
        data, dtype = config.data, jnp.dtype(config.train.dtype)
        prompts = held_out_prompts(config.validation.texts)
        texts = [sample_text(HELD_OUT_SEED, i, prompt=prompt, **data.shares) for i, prompt in enumerate(prompts)]
        table, multiple = coder(texts), samples_along(mesh)
        rows = np.arange(-(-len(texts) // multiple) * multiple) % len(texts)  # filled up with others
        self._count, self._table = len(texts), put_batch(mesh, TextTable(*(x[rows] for x in table)), whole=True)

        def measure(trainable: nnx.State, table: TextTable) -> dict[str, Array]:
            told = merge_rounded(graph, trainable, dtype)(jnp.asarray(table.clip_ids), jnp.asarray(table.t5_ids))
            targets = jnp.asarray(table.targets)
            return {
                "clip": all_right(told.clip, targets[:, : len(PROMPT_HEADS)]),
                "t5": jnp.mean(all_right(told.t5, targets[:, None]), axis=-1),
                "own": jnp.mean(all_right(told.own, jnp.asarray(table.own)), axis=-1),
                "t5_mean": all_right(jnp.mean(told.t5, axis=1), targets),
            }

        self._measure = jax.jit(traced_on(mesh, measure), out_shardings=replicated(mesh))

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """Shares that are told right completely.

        ``validation/clip`` of prompts by CLIP's vectors, ``validation/t5`` of texts by T5's tokens, one by one,
        ``validation/t5_mean`` by the mean of all tokens of a text, and ``validation/own`` of nouns by their tokens.
        """
        found = jax.device_get(self._measure(trainable, self._table))
        return {f"validation/{name}": float(np.mean(one[: self._count])) for name, one in found.items()}


@dataclass(frozen=True)
class TrainedTextEncoders:
    """An :class:`~rflow_jax.training.checkpoints.Exporter` of the whole model with these text encoders.

    Attributes:
        base: the folder that the other parts are copied from.
    """

    graph: nnx.GraphDef
    base: Path

    @property
    def exports(self) -> str:
        return "model/{step}"

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
        """Writes ``model/{step}``."""
        network = nnx.merge(self.graph, on_host(trainable))
        if folder is not None:
            save_pipeline(folder, {CLIP.folder: network.clip, T5.folder: network.t5}, base=self.base)


class ShapesText(NumberedTask[ShapesTextRunConfig]):
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model is not usable.
    """

    title, samples = "text encoders", "texts"

    def __init__(self, config: ShapesTextRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        base = require_pipeline(resolve(config.model))
        clip, t5 = CLIP.read_config(base), T5.read_config(base)
        length = defaults_of(describe(base), TRANSFORMER.read_config(base)).max_sequence_length
        self._coder = TextCoder(base, clip.max_position_embeddings, length)
        self._graph, self.trainable = nnx.split(load_encoders(base, clip, t5, mesh))
        self.flops = 3 * (encoder_flops(clip, clip.max_position_embeddings) + t5_flops(t5, length))
        data, seed = config.data, config.train.seed
        texts = make_text_table(data.texts, seed, self._coder, workers=data.workers, **data.shares)
        for component, ids, known in ((CLIP, texts.clip_ids, clip.vocab_size), (T5, texts.t5_ids, t5.vocab_size)):
            if ids.max() >= known:
                raise InputError(f"{base / component.folder}: has {known} tokens, its tokenizer gives {ids.max()}")
        self._fingerprint = texts.fingerprint
        self._table = jax.device_put(texts, replicated(mesh))
        self.exporter = TrainedTextEncoders(self._graph, base)

    def make_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> TrainStep:
        """Chooses the texts of a batch, then updates all parameters."""
        train, table, graph = self._config.train, self._table, self._graph
        dtype = jnp.dtype(train.dtype)

        def objective(trainable: nnx.State, table: TextTable, numbers: UInt32[Array, " b"]) -> tuple[Array, Metrics]:
            return loss_of(merge_rounded(graph, trainable, dtype), table, sample_keys(train.seed, numbers))

        parts = train.gradient_accumulation_steps
        update = make_update(objective, optimizer, gradient_accumulation_steps=parts, mesh=self._mesh)
        step = compile_step(update, shardings, self._mesh)

        def take(state: TrainState, inputs: Array) -> tuple[TrainState, StepMetrics]:
            return step(state, table, inputs)

        return take

    def open_validation(self, out: Path) -> TextValidation | None:
        """Prompts that are not trained on."""
        if not self._config.validation.texts:
            return None
        return TextValidation(self._config, self._coder, self._graph, self._mesh)


def load_encoders(base: Path, clip: ClipTextConfig, t5: T5Config, mesh: Mesh) -> HeadedEncoders:
    """The text encoders of a model, float32, with new heads; raises InputError if they cannot be read."""
    network = abstract(lambda rngs: HeadedEncoders(clip, t5, rngs=rngs))
    choose = sharding_for(mesh)
    for component, part, sizes in ((CLIP, network.clip, clip), (T5, network.t5, t5)):
        stored = StoredNetwork.open(base / component.folder)
        stored.load(part, component, sizes, dtype=jnp.float32, sharding_for=choose)
    put = put_by(choose)
    for path, variable in parameter_variables(network).items():
        if path.startswith(("clip_heads.", "t5_heads.", "token_head.")):
            variable.set_value(put(path, np.zeros(variable.shape, np.float32)))
    return network
