"""Reward training as a task; exports the original's checkpoint, for the verifier ``reward``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from rflow_jax.data.sources.preferences import PairSource, open_pairs
from rflow_jax.errors import InputError
from rflow_jax.models.layers import init_kernel
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, RewardModel, reward_model_of
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.partition import dotted
from rflow_jax.training.qwen.batches import RowSizes
from rflow_jax.training.qwen.model import ParamPartition, QwenTask, first_key, partition_params
from rflow_jax.training.reward.config import RewardRunConfig
from rflow_jax.training.reward.loss import NEED_LABELS, NEED_SCORES, PairMaker, PairObjective
from rflow_jax.training.reward.validation import PairValidation
from rflow_jax.training.train_state import compile_step, make_update
from rflow_jax.verifiers.reward import read_template
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import Scoring
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.qwen import load_qwen
from rflow_jax.weights.reward_config import SPECIAL_TOKEN, RewardConfig
from rflow_jax.weights.reward_export import RewardExport, export_reward
from rflow_jax.writers.prompt_template import read_prompt


@dataclass(frozen=True)
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

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
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


class Reward(QwenTask):
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    title = "a reward model"
    records = "pairs"
    rows = 2

    def __init__(self, config: RewardRunConfig, mesh: Mesh):
        self._config = config
        folder = resolve_vlm(config.model)
        exported = reward_config(config, folder)
        # The prompt template and the data come first, since they are cheap to check.
        template = read_template(exported, config.reward.prompt_file)
        source = open_checked(config, config.data.pairs, config.data.path)
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
        padded = RowSizes.of(config.data, sizes, rules, pictures=1)
        prepare = QwenProcessor(tokenizer, rules, sizes, padded.tokens, config.data.max_pixels)
        maker = PairMaker(prepare, template, padded, special)
        super().__init__(config, mesh, parts, source, maker, padded)
        self._objective = make_objective(config, parts.graph, sizes, rules, special)
        file = config.reward.prompt_file
        prompt = None if file is None else read_prompt(Path(file))
        vision = any(path[0] == "vision" for path, _ in nnx.to_flat_state(parts.trainable))
        what = RewardExport(exported, exported.base, len(tokenizer), config.reward.loss, vision, prompt)
        self.exporter = TrainedReward(parts, what, tokenizer, self._moments if config.reward.normalise else None)

    def _compile_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
        return compile_pair_step(self._config, self._objective, optimizer, shardings, self._mesh)

    def open_validation(self, out: Path) -> PairValidation | None:
        """Loss and accuracy on held-out pairs."""
        return self._validation

    @cached_property
    def _validation(self) -> PairValidation | None:
        if self._held_out is None:
            return None
        given = self._held_out, self._maker, self._objective, self._parts.frozen
        return PairValidation(self._config.validation, *given, self._mesh, self.samples_at_once)

    def _moments(self, trainable: nnx.State) -> tuple[float, float]:
        assert self._validation is not None  # its records are what rewards are normalised by
        return self._validation.moments(trainable)


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


def make_objective(
    config: RewardRunConfig,
    graph: nnx.GraphDef,
    sizes: Qwen25VLConfig,
    rules: ImageProcessorConfig,
    special: int | None,
) -> PairObjective:
    """The objective of a model with this graph."""
    scoring = Scoring(config.reward.token, special, mrope=config.reward.mrope)
    attention, remat = config.train.attention, config.train.remat
    return PairObjective(graph, rules, scoring, config.reward.loss, sizes.vision.unit, attention, remat)


def compile_pair_step(
    config: RewardRunConfig,
    objective: PairObjective,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    mesh: Mesh,
) -> Any:
    """Compiles the step of (state, frozen parameters, pairs)."""
    update = make_update(
        objective, optimizer, gradient_accumulation_steps=config.train.gradient_accumulation_steps, mesh=mesh
    )
    return compile_step(update, shardings, mesh)


def begin(base: Qwen25VL, special: int | None, seed: int, dtype: Dtype) -> RewardModel:
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
