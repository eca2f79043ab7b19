"""What a training run is told: one YAML file, or the flags of ``train.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rflow_jax.data.config import DataConfig
from rflow_jax.errors import InputError
from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.remat import Remat
from rflow_jax.parallel.layout import DistributedConfig, MeshConfig
from rflow_jax.settings import require_dtype, require_least, require_seed
from rflow_jax.training.checkpoints import CheckpointConfig
from rflow_jax.training.model import TrainableConfig
from rflow_jax.training.optimizers import OptimizerConfig
from rflow_jax.training.validation import ValidationConfig
from rflow_jax.training.watch import WatchConfig


@dataclass(frozen=True)
class LoopConfig:
    """The steps of a run, whatever is trained.

    Attributes:
        steps: optimizer steps in all.
        batch_size: samples of one optimizer step, on all devices together.
        accumulation: a batch is taken in so many parts, one after the other, to save memory.
        remat: what the backward pass computes again: ``none`` (needs the most memory), ``dots`` or ``full``.
        dtype: of the activations and of the parameters that stay as they are.
        seed: every draw derives from it.
        attention: see rflow_jax/models/attention.py.
    """

    steps: int = 6000
    batch_size: int = 64
    accumulation: int = 1
    remat: Remat = "full"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    attention: AttentionImpl = "auto"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_least(self, "train", steps=1, batch_size=1, accumulation=1)
        require_seed("train.seed", self.seed)

    def check_batch(self, devices: int) -> None:
        """Raises InputError unless every device gets as many samples, in every part of the batch."""
        if self.batch_size % (devices * self.accumulation):
            raise InputError(
                f"train.batch_size is {self.batch_size}: give a multiple of {devices * self.accumulation} (samples are "
                f"spread over {devices} device{'s' if devices > 1 else ''}, in {self.accumulation} parts)"
            )


@dataclass(frozen=True)
class StepConfig(LoopConfig):
    """The steps of a run.

    Attributes:
        steps: optimizer steps in all.
        batch_size: samples of one optimizer step, on all devices together.
        accumulation: a batch is taken in so many parts, one after the other, to save memory.
        remat: what the backward pass computes again: ``none`` (needs the most memory), ``dots`` or ``full``.
        dtype: of the activations and of the parameters that stay as they are.
        seed: every draw derives from it: data, times, noise and the first LoRA.
        attention: see rflow_jax/models/attention.py.
        union_cond_attn, add_cond_attn, latent_lora: how the condition takes part, as in ``infer.py``.
        max_sequence_length: T5 tokens; null takes the model's own.
        scan_blocks: stack the transformer's blocks and loop over them: a program that compiles in a fraction of the
            time; null: on TPU.
    """

    union_cond_attn: bool = True
    add_cond_attn: bool = False
    latent_lora: bool = False
    max_sequence_length: int | None = None
    scan_blocks: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, "train", max_sequence_length=1)

    @property
    def flags(self) -> ConditionFlags:
        return ConditionFlags(self.union_cond_attn, self.add_cond_attn, self.latent_lora)


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every task is told."""

    task: str
    model: str
    out: str
    resume: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise InputError("out is empty: name the folder of the run")

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return dict(_flat(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommonConfig):
    """Trains the corrector on GenRef.

    Attributes:
        task: what is trained.
        model: the pipeline: a converted or diffusers-layout folder, or a Hub id.
        out: folder of the run.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        trainable: what is trained.
        optimizer: how it moves.
        train: the steps.
        mesh: how the devices are arranged.
        distributed: several processes as one run.
        data: what it is trained on.
        checkpoint: when the run is saved.
        validation: how it is tried on held-out records.
        watch: how it is watched.
    """

    task: Literal["corrector"] = "corrector"
    data: DataConfig
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    train: StepConfig = field(default_factory=StepConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
