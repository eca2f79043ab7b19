"""Reward training as a task; exports the original's checkpoint, for the verifier ``reward``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.data.sources.preferences import PairSource, open_pairs
from rflow_jax.errors import InputError
from rflow_jax.models.layers import init_kernel
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, RewardModel, reward_model_of
from rflow_jax.parallel.mesh import put_batch
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.partition import dotted
from rflow_jax.training.prefetch import slots_here
from rflow_jax.training.qwen.batches import ArrayBatch, ArrayLoader, RowSizes, open_array_loader
from rflow_jax.training.qwen.model import ParamPartition, first_key, flops_of_sample, partition_params
from rflow_jax.training.reward.config import RewardRunConfig
from rflow_jax.training.reward.loss import NEED_LABELS, NEED_SCORES, PairInputs, PairMaker, PairObjective
from rflow_jax.training.reward.validation import PairValidation
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import StepMetrics, TrainState, compile_step, make_update
from rflow_jax.verifiers.reward import read_template
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import Scoring
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.qwen import load_qwen
from rflow_jax.weights.reward import SPECIAL_TOKEN, RewardConfig, RewardExport, export_reward
from rflow_jax.writers.prompt_template import read_prompt


@dataclass
class TrainedReward:
    """A reward model in two parts; an :class:`~rflow_jax.training.checkpoints.Exporter`.

    Attributes:
        measure: parameters -> mean and deviation of rewards, to normalise scores; None: no normalisation.
    """

    parts: ParamPartition
    what: RewardExport
    tokenizer: QwenTokenizer
    measure: Callable[[Any], tuple[float, float]] | None = None
    exports = "reward/checkpoint-{step}"

    def export(self, trainable: Any, folder: Path | None) -> None:
        """Writes ``reward/checkpoint-N``, and ``reward/model_config.json`` beside it."""
        what = self.what
        if self.measure is not None:
            mean, std = self.measure(trainable)
            what = replace(what, config=replace(what.config, mean=mean, std=std))
        model = self.parts.merged(trainable)
        if folder is not None:
            flat = nnx.to_flat_state(trainable)
            trained = {dotted(path) for path, leaf in flat if not isinstance(leaf, nnx.LoRAParam)}
            export_reward(model, trained, what, self.tokenizer.save, folder)


HEAD = r"reward\.kernel|language\.embed\.special"
_FROM_FILE = "file"  # the name of the run's own prompt template in an export


class Reward:
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    title = "a reward model"

    def __init__(self, config: RewardRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        folder = resolve_vlm(config.model)
        exported = reward_config(config, folder)
        # The prompt template and the data come first, since they are cheap to check.
        template = read_template(exported, config.reward.prompt_file)
        self._source = open_checked(config, config.data.pairs, config.data.path)
        held_out = config.validation
        self._held_out = (
            open_checked(config, held_out.pairs, held_out.path) if held_out.pairs or held_out.path else None
        )
        tokenizer = QwenTokenizer(folder, added=[SPECIAL_TOKEN] if exported.special_tokens else [])
        special = tokenizer.id_of(SPECIAL_TOKEN) if exported.special_tokens else None

        seed, dtype = config.train.seed, jnp.dtype(config.train.dtype)
        base = load_qwen(folder, dtype=dtype, sharding_for=sharding_for(mesh))
        parts = partition_params(begin(base, special, seed, dtype), config, mesh, also=HEAD)
        sizes, rules = base.config, read_image_processor_config(folder, base.config)
        self._sizes = row_sizes(config, sizes, rules)
        context = min(config.data.max_tokens, sizes.language.max_position_embeddings)
        prepare = QwenProcessor(tokenizer, rules, sizes, context, config.data.max_pixels)
        self._maker = PairMaker(prepare, template, self._sizes, special)
        self._objective = make_objective(config, parts.graph, sizes, rules, special)
        file = config.reward.prompt_file
        prompt = None if file is None else read_prompt(Path(file))
        vision = any(path[0] == "vision" for path, _ in nnx.to_flat_state(parts.trainable))
        what = RewardExport(exported, exported.base, len(tokenizer), config.reward.loss, vision, prompt)
        self.exporter = TrainedReward(parts, what, tokenizer)
        self.trainable = parts.trainable

    @cached_property
    def flops(self) -> float:
        """Of a pair."""
        sizes = self._sizes
        parts, config = self.exporter.parts, self._maker.prepare.config
        return 2 * flops_of_sample(parts, config, tokens=sizes.tokens, patches=sizes.patches, pictures=1)

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def to_running(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> ArrayLoader:
        """Batches of pairs from a step on."""
        train, data = self._config.train, self._config.data
        slots = slots_here(self._mesh, train.batch_size)
        options = {"seed": train.seed, "batch_size": train.batch_size, "slots": slots, "name": "pairs"}
        return open_array_loader(self._source, self._maker, data, start=start, position=position, **options)

    def put(self, batch: ArrayBatch) -> PairInputs:
        """Pairs on the mesh."""
        return put_batch(self._mesh, batch.inputs)

    def make_step(self, optimizer: Any, shardings: Any) -> TrainStep:
        """Scores both images of each pair, then updates the parameters."""
        step = compile_pair_step(self._config, self._objective, optimizer, shardings, self._mesh)
        frozen = self.exporter.parts.frozen

        def take(state: TrainState, inputs: PairInputs) -> tuple[TrainState, StepMetrics]:
            return step(state, frozen, inputs)

        return take

    def open_validation(self, out: Path) -> PairValidation | None:
        """Loss and accuracy on held-out pairs."""
        config, source = self._config.validation, self._held_out
        if source is None:
            return None
        batch = self._config.train.batch_size // self._config.train.gradient_accumulation_steps
        frozen = self.exporter.parts.frozen
        found = PairValidation(config, source, self._maker, self._objective, frozen, self._mesh, batch)
        if self._config.reward.normalise:
            self.exporter.measure = found.moments
        return found


def reward_config(config: RewardRunConfig, folder: Path) -> RewardConfig:
    """The configuration that an export contains."""
    base = str(folder.absolute()) if Path(config.model).expanduser().exists() else config.model
    return RewardConfig(
        base,
        token=config.reward.token,
        special_tokens=config.reward.token == "special",
        rank=config.lora.rank,
        alpha=float(config.lora.rank if config.lora.alpha is None else config.lora.alpha),
        max_pixels=config.data.max_pixels,
        template="none" if config.reward.prompt_file is None else _FROM_FILE,
    )


def row_sizes(config: RewardRunConfig, sizes: Qwen25VLConfig, rules: ImageProcessorConfig) -> RowSizes:
    """The sizes that an image and its prompt are padded to."""
    data = config.data
    limits = {"max_pixels": data.max_pixels, "max_ratio": data.max_ratio}
    return RowSizes.of(sizes.vision, rules, tokens=data.max_tokens, pictures=1, **limits)


def make_objective(
    config: RewardRunConfig, graph: Any, sizes: Qwen25VLConfig, rules: ImageProcessorConfig, special: int | None
) -> PairObjective:
    """The objective of a model with this graph."""
    scoring = Scoring(config.reward.token, special, mrope=config.reward.mrope)
    attention, remat = config.train.attention, config.train.remat
    return PairObjective(graph, rules, scoring, config.reward.loss, sizes.vision.unit, attention, remat)


def compile_pair_step(
    config: RewardRunConfig, objective: PairObjective, optimizer: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Compiles the step of (state, frozen parameters, pairs)."""
    update = make_update(objective, optimizer, accumulation=config.train.gradient_accumulation_steps, mesh=mesh)
    return compile_step(update, shardings, mesh)


def begin(base: Qwen25VL, special: int | None, seed: int, dtype: Any) -> RewardModel:
    """The reward model before the first step: a random head; the special token is the mean of the others."""
    table = base.language.embed.embedding[...]
    mean = None if special is None else jnp.mean(table[:special], axis=0, keepdims=True, dtype=jnp.float32)
    key = jax.random.fold_in(first_key(seed), 1)
    return reward_model_of(base, init_kernel(key, (table.shape[1], 1), dtype), special, mean)


def open_checked(config: RewardRunConfig, pairs: str | None, path: str | list[str] | None) -> PairSource:
    """The pairs; raises InputError if the loss could learn nothing from them."""
    data, loss = config.data, config.reward.loss
    source = open_pairs(pairs, path, format=data.format, cache=data.cache, retry=data.retry)
    if loss in NEED_SCORES and not source.has_scores:
        raise InputError(f"reward.loss is {loss}: it takes people's scores, and {pairs or path} has none")
    if loss in NEED_LABELS and not source.labels & NEED_LABELS[loss]:
        wanted = "A, B or same" if loss == "btt" else "A or B"
        raise InputError(f"reward.loss is {loss}: {pairs or path} has no line with a label {wanted}")
    return source
