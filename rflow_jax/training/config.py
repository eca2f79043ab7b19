"""The configuration of a training run: one YAML file, or the flags of ``rflow train``."""

from __future__ import annotations

import pkgutil
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rflow_jax.data.config import DataConfig, Format
from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.options import CORRECTOR_TARGET_MODULES, AttentionImpl, Remat
from rflow_jax.parallel.layout import DistributedConfig, MeshConfig
from rflow_jax.utils.checks import (
    flatten,
    nearest,
    require_dtype,
    require_pattern,
)
from rflow_jax.utils.ranges import (
    BatchSize,
    Between,
    Count,
    CountOrZero,
    Decay,
    DenoisingSteps,
    NotNegative,
    Positive,
    Rank,
    Seed,
    Tokens,
    require_ranges,
)
from rflow_jax.utils.secrets import public_addresses


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA that is trained.

    Attributes:
        rank: its rank.
        alpha: its strength is alpha / rank; null is the rank.
        target_modules: regular expression on dotted paths: the linears that get an adapter.
        init_from: a LoRA file to start from, in place of a fresh one; it brings its own rank and linears.
    """

    rank: Rank = 32
    alpha: Positive | None = None
    target_modules: str = CORRECTOR_TARGET_MODULES
    init_from: str | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "lora")
        require_pattern("lora.target_modules", self.target_modules)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept.

    Attributes:
        every: steps between two.
        keep_last: how many of the newest are kept.
        keep_every: those at multiples of it are kept for good.
        export: also write what was trained for other programs, such as ``lora/{step}`` of the corrector.
    """

    every: Count = 2000
    keep_last: Count = 3
    keep_every: Count | None = None
    export: bool = True

    def __post_init__(self) -> None:
        require_ranges(self, "checkpoint")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on records that are held out.

    Attributes:
        path: of the held-out records, as in ``data``; null: no validation.
        format: of what is there, as in ``data``.
        every: steps between two; there is one before the first step too.
        records: how many of each subset give the loss.
        pictures: how many images of each subset are generated.
        times: the loss is the mean over these times in (0, 1), 1 is noise.
        num_inference_steps: denoising steps of an image; null: the model's own.
        guidance_scale: of an image; null: the model's own.
        seed: of noise, in losses and images.
    """

    path: str | list[str] | None = None
    format: Format = "tar"
    every: Count = 1000
    records: Count = 8
    pictures: CountOrZero = 1
    times: tuple[Between, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    num_inference_steps: DenoisingSteps | None = None
    guidance_scale: NotNegative | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_ranges(self, "validation")
        if not self.times:
            raise InputError("validation.times is empty: give numbers between 0 and 1")
        if self.format in ("stream", "precomputed"):
            raise InputError(f"validation.format is {self.format}: give tar or tfds")


@dataclass(frozen=True)
class LoggingConfig:
    """How a run reports its progress.

    Attributes:
        every: steps between two lines.
        tensorboard: write TensorBoard's files into ``tensorboard``.
        wandb: name of a Weights & Biases project to report to as well.
        peak_tflops: of one device, for the FLOP utilisation (MFU); null: known by the device's name, for bfloat16.
    """

    every: Count = 10
    tensorboard: bool = True
    wandb: str | None = None
    peak_tflops: Positive | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "logging")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its settings; the defaults are the original's.

    Attributes:
        name: ``prodigy`` (finds its own step size; keep lr at 1), ``adamw``, ``sgd``, or ``muon`` for networks from
            nothing: the matrices that muon_parameters names by Muon, whose steps have the size of AdamW's, and all
            other parameters by Adam without decay.
        lr: learning rate, the highest of its schedule.
        schedule: after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to 0 at decay_steps.
        warmup_steps: number of steps over which it rises linearly.
        decay_steps: the step at which ``linear`` and ``cosine`` end.
        decay_start: the step at which they begin; null: after the warm-up.
        max_grad_norm: the gradients' global norm is clipped to this.
        weight_decay: decoupled, as in AdamW.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the denominator.
        d0: Prodigy's first guess of the step size.
        d_coef: Prodigy's guesses are multiplied by this.
        safeguard_warmup: keep a learning rate that warms up from inflating Prodigy's guess.
        muon_parameters: regular expression on the dotted paths of matrices; by default those of a transformer's blocks,
            but not their modulations.
        momentum: of Muon.
        adam_lr: learning rate of the parameters that are not Muon's, the highest of the same schedule; null: lr.
    """

    name: Literal["prodigy", "adamw", "sgd", "muon"] = "prodigy"
    lr: Positive = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrZero = 0
    decay_steps: Count | None = None
    decay_start: CountOrZero | None = None
    max_grad_norm: Positive = 0.5
    weight_decay: NotNegative = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    d0: Positive = 1e-6
    d_coef: Positive = 1.0
    safeguard_warmup: bool = True
    muon_parameters: str = r".*blocks\.\d+\.(?!.*mod).*kernel"
    momentum: Decay = 0.95
    adam_lr: Positive | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "optimizer")
        require_pattern("optimizer.muon_parameters", self.muon_parameters)
        if self.schedule == "constant" and self.decay_steps is not None:
            raise InputError(
                "optimizer.decay_steps has no effect on optimizer.schedule constant: leave it out, or give linear or "
                "cosine"
            )
        if self.schedule != "constant" and (self.decay_steps or 0) <= self.warmup_steps:
            raise InputError(
                f"optimizer.schedule {self.schedule} ends at decay_steps: give optimizer.decay_steps a number above "
                f"warmup_steps ({self.warmup_steps})"
            )
        if self.decay_start is not None and not self.warmup_steps <= self.decay_start < (self.decay_steps or 0):
            raise InputError(
                f"optimizer.decay_start is {self.decay_start}: give a number from warmup_steps ({self.warmup_steps}) "
                f"and below decay_steps ({self.decay_steps})"
            )


@dataclass(frozen=True)
class LoopConfig:
    """The steps of a run, whatever is trained.

    Attributes:
        steps: optimizer steps in all.
        batch_size: samples of one optimizer step, on all devices together.
        gradient_accumulation_steps: the batch is processed in this number of parts, one after the other, to save
            memory.
        remat: what the backward pass computes again: ``none`` (needs the most memory), ``dots_and_attention``,
            ``dots`` or ``full`` (the least).
        dtype: of the activations and of the parameters that stay as they are.
        seed: every draw derives from it.
        attention: see rflow_jax/models/attention.py.
    """

    steps: Count = 6000
    batch_size: BatchSize = 64
    gradient_accumulation_steps: BatchSize = 1
    remat: Remat = "full"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: Seed = 0
    attention: AttentionImpl = "auto"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_ranges(self, "train")

    def check_batch(self, devices: int) -> None:
        """Raises InputError unless every device gets the same number of samples, in every part of the batch."""
        parts = self.gradient_accumulation_steps
        if self.batch_size % (devices * parts):
            raise InputError(
                f"train.batch_size is {self.batch_size}: give a multiple of {devices * parts} (samples are spread over "
                f"{devices} device{'s' if devices > 1 else ''}, in {parts} gradient accumulation steps)"
            )


@dataclass(frozen=True)
class StepConfig(ConditionFlags, LoopConfig):
    """The steps of a run.

    Attributes:
        seed: every draw derives from it: data, times, noise and the first LoRA.
        max_sequence_length: T5 tokens; null takes the model's own.
        scan_blocks: stack the transformer's blocks and loop over them: a program that compiles in a fraction of the
            time; null: on TPU.
    """

    max_sequence_length: Tokens | None = None
    scan_blocks: bool | None = None


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """The settings that every task has.

    Attributes:
        task: what is trained.
        model: the model it begins with.
        out: folder of the run.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        trainable_parameters: regular expression on dotted parameter paths of the model: train these and no LoRA (".*"
            is all of them).
        lora: the LoRA that is trained.
        optimizer: its name and settings.
        train: the steps.
        mesh: the layout of the devices.
        distributed: several processes as one run.
        data: what it is trained on.
        checkpoint: when the run is saved.
        validation: evaluation on held-out records.
        logging: reports of its progress.
    """

    task: str
    model: str
    out: str
    resume: bool = False
    trainable_parameters: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise InputError("out is empty: name the folder of the run")
        require_pattern("trainable_parameters", self.trainable_parameters)

    def flat(self) -> dict[str, Any]:
        """Every public setting by its dotted name."""
        return flatten(self.public())

    def public(self) -> dict[str, Any]:
        """All settings, for files: without the passwords and signatures of addresses."""
        return public_addresses(asdict(self))


@dataclass(frozen=True, kw_only=True)
class CorrectorRunConfig(CommonConfig):
    """Trains the corrector on GenRef.

    Attributes:
        model: the pipeline: a converted or diffusers-layout folder, or a Hub id.
    """

    task: Literal["corrector"] = "corrector"
    data: DataConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: StepConfig = field(default_factory=StepConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable_parameters is not None and self.lora.init_from is not None:
            raise InputError("trainable_parameters trains no LoRA: leave lora.init_from out")


# The key ``task`` of a configuration -> (its dataclass, the class that is made from it and a mesh).
TASKS = {
    "corrector": ("rflow_jax.training.config:CorrectorRunConfig", "rflow_jax.training.corrector.task:Corrector"),
    "reward": ("rflow_jax.training.reward.config:RewardRunConfig", "rflow_jax.training.reward.task:Reward"),
    "sft": ("rflow_jax.training.sft.config:SftRunConfig", "rflow_jax.training.sft.task:Sft"),
    "shapes_transformer": (
        "rflow_jax.shapes.transformer_config:ShapesTransformerRunConfig",
        "rflow_jax.shapes.transformer:ShapesTransformer",
    ),
    "shapes_autoencoder": (
        "rflow_jax.shapes.autoencoder_config:ShapesAutoencoderRunConfig",
        "rflow_jax.shapes.autoencoder:ShapesAutoencoder",
    ),
    "shapes_text": ("rflow_jax.shapes.text_config:ShapesTextRunConfig", "rflow_jax.shapes.text_encoders:ShapesText"),
}
DEFAULT_TASK = "corrector"


def config_class(task: str) -> type:
    """The dataclass of a task's configuration.

    Raises:
        InputError: there is no such task.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}: did you mean {nearest(task, TASKS)}? There are {', '.join(TASKS)}")
    return pkgutil.resolve_name(TASKS[task][0])
