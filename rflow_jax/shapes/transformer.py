"""Training of the transformer as a task: flow matching on pictures, and on conditions to keep or to ignore."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.flow import pack as pack_latents
from rflow_jax.flow import rope_for
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Pipeline
from rflow_jax.models.flux.config import forward_flops
from rflow_jax.parallel.mesh import replicated
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.shapes.edits import reflection, repair, spoil
from rflow_jax.shapes.grammar import held_out_prompts, sample_prompt
from rflow_jax.shapes.judge import judge
from rflow_jax.shapes.model import require_pipeline, save_pipeline
from rflow_jax.shapes.numbered_task import NumberedTask
from rflow_jax.shapes.render import pack
from rflow_jax.shapes.requirements import remedies
from rflow_jax.shapes.scene_table import SceneTable, made_in_chunks
from rflow_jax.shapes.scenes import SIZE, make_scene
from rflow_jax.shapes.text_table import load_tokenizers
from rflow_jax.shapes.transformer_config import FlowConfig, PromptValidationConfig, ShapesTransformerRunConfig
from rflow_jax.shapes.vocabulary import T5_LENGTH
from rflow_jax.tokenizers.flux import t5_prompt
from rflow_jax.training.config import LoraConfig
from rflow_jax.training.corrector.loss import Examples, flow_matching_losses
from rflow_jax.training.corrector.step import sample_keys
from rflow_jax.training.partition import PartitionedModel, load_trainable_model, on_host
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import MeanMetric, Metrics, StepMetrics, TrainState, compile_step, make_update
from rflow_jax.typing import Array, Float, Int, UInt32
from rflow_jax.verifiers.findings import KEEP
from rflow_jax.weights.components import TRANSFORMER
from rflow_jax.weights.hub import resolve

ROW, OTHER, TIME, NOISE, TEXT, KIND = range(6)  # what a sample's key is folded with for each of its draws
ENCODED = 512  # pictures that the autoencoder encodes at once


class Pictures(NamedTuple):
    """Pictures as latents, with the tokens of their texts.

    Attributes:
        latents: packed and normalized.
        plain, reflected, keep: T5's tokens of the prompt alone, with a reflection, and told to keep everything.
        empty: T5's tokens of no text.
    """

    latents: Float[Array, "n i f"]
    clip: Int[Array, "n c"]
    plain: Int[Array, "n t"]
    reflected: Int[Array, "n t"]
    keep: Int[Array, "n t"]
    empty: Int[Array, " t"]


@dataclass(frozen=True)
class PictureMaker:
    """Makes scenes and texts of these numbers; runs in a worker.

    Attributes:
        model: the folder of the tokenizers.
        clip_length: tokens that CLIP takes.
    """

    seed: int
    model: Path
    clip_length: int

    def __call__(self, numbers: range) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(items, backgrounds, tokens by their names in :class:`Pictures`)."""
        scenes, texts = [], []
        for number in numbers:
            rng = Random(f"picture {number} of {self.seed}")
            prompt = sample_prompt(rng)
            scene = make_scene(prompt, rng)
            wrong = spoil(scene, prompt, rng)
            edits = repair(prompt, wrong, rng)[0] if rng.random() < 0.5 else remedies(prompt, wrong)
            scenes.append(scene)
            texts.append((rng.choice(prompt.wordings()).text, reflection(edits)))
        prompts = [prompt for prompt, _ in texts]
        tokenizers = load_tokenizers(self.model)
        tokens = {
            "clip": tokenizers.clip(prompts, self.clip_length),
            "plain": tokenizers.t5(prompts, T5_LENGTH),
            "reflected": tokenizers.t5([t5_prompt(*both) for both in texts], T5_LENGTH),
            "keep": tokenizers.t5([t5_prompt(prompt, KEEP) for prompt in prompts], T5_LENGTH),
        }
        return *pack(scenes), {name: np.asarray(ids, np.int16) for name, ids in tokens.items()}


def make_pictures(
    config: ShapesTransformerRunConfig, base: Path, model: PartitionedModel, mesh: Mesh
) -> tuple[Pictures, str]:
    """The pictures of a run on its devices, and their fingerprint.

    Args:
        base: the folder of the model.
    """
    flux = model.bundle
    maker = PictureMaker(config.train.seed, base, flux.clip_length)
    made = made_in_chunks(maker, config.data.pictures, config.data.workers)
    table = SceneTable(*(np.concatenate([part[k] for part in made]) for k in range(2)))
    every = {name: np.concatenate([tokens[name] for *_, tokens in made]) for name in made[0][-1]}
    every["empty"] = np.asarray(flux.tokenizers.t5([""], T5_LENGTH)[0], np.int16)
    fingerprint = table.fingerprint + hashlib.sha256(every["reflected"].tobytes()).hexdigest()[:16]
    return Pictures(encode_all(table, flux, mesh), **jax.device_put(every, replicated(mesh))), fingerprint


def encode_all(table: SceneTable, flux: Any, mesh: Mesh) -> Float[Array, "n i f"]:
    """The packed latents of every scene, in bfloat16: the means, normalized."""
    graph, weights = flux.graphs.vae, flux.weights["vae"]

    @jax.jit
    def encode(weights: Any, scenes: SceneTable) -> Array:
        vae = nnx.merge(graph, weights)
        pixels = scenes.draw(jnp.arange(len(scenes.items))).astype(jnp.float32) / 127.5 - 1
        mean, _ = vae.encode(pixels.astype(flux.dtype))
        return pack_latents(vae.scale(mean.astype(jnp.float32))).astype(jnp.bfloat16)

    count, parts = len(table.items), []
    for start in range(0, count, ENCODED):
        rows = np.arange(start, start + ENCODED) % count
        parts.append(encode(weights, SceneTable(*(part[rows] for part in table))))
    return jax.device_put(jnp.concatenate(parts)[:count], replicated(mesh))


class PromptValidation:
    """One image of each of some held-out prompts, exactly judged.

    Args:
        pipe: makes the images.
        model: whose transformer is trained.
    """

    def __init__(self, config: PromptValidationConfig, pipe: Pipeline, model: PartitionedModel):
        self.every, self._config, self._pipe, self._model = config.every, config, pipe, model
        self._prompts = held_out_prompts(config.prompts)
        self._settings = SamplingConfig(num_inference_steps=config.num_inference_steps)

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """``validation/all`` and ``validation/{tag}``: the share of images that show their prompt."""
        seeds = [(self._config.seed, number) for number in range(len(self._prompts))]
        pipe = self._pipe.with_weights(self._model.bundle_with(trainable).weights)
        images = pipe.generate([one.text for one in self._prompts], seeds=seeds, settings=self._settings)
        right = [judge(prompt, image).correct for prompt, image in zip(self._prompts, images, strict=True)]
        count = Counter(prompt.tag for prompt in self._prompts)
        good = Counter(prompt.tag for prompt, ok in zip(self._prompts, right, strict=True) if ok)
        return {f"validation/{tag}": good[tag] / count[tag] for tag in count} | {
            "validation/all": float(np.mean(right))
        }


@dataclass(frozen=True)
class TrainedTransformer:
    """An :class:`~rflow_jax.training.task.Exporter` of the whole model with this transformer."""

    model: PartitionedModel
    base: Path

    @property
    def exports(self) -> str:
        return "model/{step}"

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
        """Writes ``model/{step}``."""
        network = self.model.graph.merge(on_host(trainable))
        if folder is not None:
            save_pipeline(folder, {TRANSFORMER.folder: network}, base=self.base)


class ShapesTransformer(NumberedTask[ShapesTransformerRunConfig]):
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model is not usable.
    """

    title, samples = "a transformer", "pictures"

    def __init__(self, config: ShapesTransformerRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        base, train = require_pipeline(resolve(config.model)), config.train
        options = {"seed": train.seed, "dtype": train.dtype, "mesh": mesh}
        self._model = load_trainable_model(str(base), LoraConfig(), ".*", **options)
        self.trainable = self._model.trainable
        with reproducible(train.dtype):
            self._pictures, self._fingerprint = make_pictures(config, base, self._model, mesh)
        self.exporter = TrainedTransformer(self._model, base)
        side = SIZE // self._model.bundle.token_pixels
        self._grid = side, side
        parts = {"text": T5_LENGTH, "image": side * side}
        flux = self._model.bundle.flux_config
        once = forward_flops(flux, **parts, condition=0)
        self.flops = 3 * (once + config.flow.conditions * forward_flops(flux, **parts, condition=side * side))

    def to_saved(self, state: TrainState) -> TrainState:
        """The state with parameters by block."""
        return self._model.to_saved(state)

    def to_running(self, state: TrainState) -> TrainState:
        """The state of a checkpoint in the form of this run's network."""
        return self._model.to_running(state)

    def make_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> TrainStep:
        """Draws a batch, encodes its texts, then updates all parameters."""
        config, model, pictures = self._config, self._model, self._pictures
        flow, train, graphs = config.flow, config.train, model.bundle.graphs
        # Arguments of the program: a constant in it would be fetched from a device.
        ropes = [rope_for(model.graph.config, T5_LENGTH, *grids) for grids in ((self._grid,), (self._grid, self._grid))]
        weights = {name: model.bundle.weights[name] for name in ("clip", "t5")}
        options: dict[str, Any] = {"dtype": jnp.dtype(train.dtype), "remat": train.remat, "attention": train.attention}

        def objective(trainable: nnx.State, frozen: Any, numbers: UInt32[Array, " b"]) -> tuple[Array, Metrics]:
            pictures, weights, (rope, both) = frozen
            network = model.graph.merge(trainable)

            def embedded(batch: Batch) -> Examples:
                _, pooled = nnx.merge(graphs.clip, weights["clip"])(batch.clip)
                text = nnx.merge(graphs.t5, weights["t5"])(batch.t5)
                return Examples(batch.x_0, batch.condition, *(x.astype(train.dtype) for x in (text, pooled)))

            keys = sample_keys(train.seed, numbers)
            batch = draw_batch(pictures, keys, flow)
            losses = flow_matching_losses(network, embedded(batch), batch.t, batch.x_1, rope, **options)
            loss, metrics = jnp.mean(losses), {}
            if count := round(flow.conditions * len(numbers)):
                seen = draw_conditions(pictures, keys[:count], batch, flow)
                again = flow_matching_losses(network, embedded(seen), seen.t, seen.x_1, both, **options)
                loss = (jnp.sum(losses) + jnp.sum(again)) / (len(numbers) + count)
                metrics = {"condition": MeanMetric(jnp.sum(again), jnp.asarray(count, jnp.float32))}
            return loss, metrics

        parts = train.gradient_accumulation_steps
        update = make_update(objective, optimizer, gradient_accumulation_steps=parts, mesh=self._mesh)
        step = compile_step(update, shardings, self._mesh)

        def take(state: TrainState, inputs: Array) -> tuple[TrainState, StepMetrics]:
            return step(state, (pictures, weights, ropes), inputs)

        return take

    def open_validation(self, out: Path) -> PromptValidation | None:
        """Images of held-out prompts."""
        config, model = self._config.validation, self._model
        if not config.prompts:
            return None
        pipe = Pipeline(model.bundle_with(model.trainable), attention=self._config.train.attention, mesh=self._mesh)
        return PromptValidation(config, pipe, model)


class Batch(NamedTuple):
    """What a batch of samples is made of.

    Attributes:
        x_1: noise.
        t: times, 1 is noise.
    """

    x_0: Float[Array, "b i f"]
    x_1: Float[Array, "b i f"]
    t: Float[Array, " b"]
    clip: Int[Array, "b c"]
    t5: Int[Array, "b t"]
    condition: Float[Array, "b i f"] | None
    rows: Int[Array, " b"]


def draw_batch(pictures: Pictures, keys: Array, flow: FlowConfig) -> Batch:
    """A picture, a text, a time and noise for each key."""
    rows = _integers(keys, ROW, len(pictures.latents))
    x_0 = pictures.latents[rows].astype(jnp.float32)
    x_1 = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), x_0.shape[1:]))(keys)
    normal = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, TIME)))(keys)
    u = _uniform(keys, TEXT)[:, None]
    t5 = jnp.where(u < flow.reflections, pictures.reflected[rows], pictures.plain[rows])
    t5 = jnp.where(u > 1 - flow.empty_texts, pictures.empty, t5).astype(jnp.int32)
    t = jax.nn.sigmoid(flow.time_mean + flow.time_std * normal)
    return Batch(x_0, x_1, t, pictures.clip[rows].astype(jnp.int32), t5, None, rows)


def draw_conditions(pictures: Pictures, keys: Array, batch: Batch, flow: FlowConfig) -> Batch:
    """The first samples of a batch again, with a condition: the picture itself, or another one."""
    count = len(keys)
    first: Batch = jax.tree.map(lambda part: part[:count], batch)
    kind = _uniform(keys, KIND)
    rows = jnp.where(kind < 0.75, first.rows, _integers(keys, OTHER, len(pictures.latents)))
    keep, plain = pictures.keep[first.rows], pictures.plain[first.rows]
    t5 = jnp.where(kind[:, None] < 0.5, keep, plain).astype(jnp.int32)
    return first._replace(t5=t5, condition=pictures.latents[rows])


def _integers(keys: Array, draw: int, end: int) -> Int[Array, " b"]:
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, draw), (), 0, end))(keys)


def _uniform(keys: Array, draw: int) -> Float[Array, " b"]:
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw)))(keys)
