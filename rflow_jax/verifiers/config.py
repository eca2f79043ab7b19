"""Configurations of verifiers: a dataclass for each kind, and the registry of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rflow_jax.errors import InputError
from rflow_jax.openai_client.endpoint import Connection, Endpoint
from rflow_jax.utils.checks import require_dtype
from rflow_jax.utils.ranges import BatchSize, CountOrZero, DeviceId, Finite, Pixels, Positive, require_ranges
from rflow_jax.utils.registry import EXECUTION, LATER, Component, PluginOptions, Registry
from rflow_jax.utils.secrets import require_no_secret
from rflow_jax.vlm.config import CHECKPOINT, Quantization


@dataclass(frozen=True)
class VerifierConfig(Component):
    """The settings of any verifier; ``name`` says which."""


class LocalVerifierConfig(VerifierConfig):
    """A model in this process, which is made as ``Class(config)``; others get a meter of their cost as well."""


@dataclass(frozen=True)
class OpenAIVerifierConfig(Endpoint, VerifierConfig):
    """Grades in JSON, from any OpenAI-compatible endpoint.

    Attributes:
        prompts: folder with judge.md, question.md and aspects.json, instead of the ones shipped here.
    """

    name: Literal["openai"] = field(default="openai", init=False)
    prompts: str | None = None
    asks_endpoint: ClassVar[bool] = True


@dataclass(frozen=True)
class YesNoVerifierConfig(Connection, VerifierConfig):
    """The likelihood of yes and no as the first word of an endpoint's answer.

    Attributes:
        template: what is asked: question, raw (the prompt alone), or a file with $prompt in it.
    """

    name: Literal["yesno"] = field(default="yesno", init=False)
    template: str = "question"
    asks_endpoint: ClassVar[bool] = True


@dataclass(frozen=True)
class NvilaVerifierConfig(LocalVerifierConfig):
    """NVILA-Lite-2B-Verifier in this process.

    Attributes:
        model: a published checkpoint, a converted folder, or an id on the Hub.
        template: "raw" shows it the prompt as it is, as the original does; "question" asks the question that the
            verifier was trained with.
        rank: "word" ranks yes before no, yes by higher score, no by lower; "margin" scores by yes minus no.
        batch_size: images judged together.
        dtype: number type of the weights and activations, bfloat16 or float32.
        devices: numbers of the devices that the model takes for itself, as JAX counts them; several share its weights.
            null: the first one, with whatever else is there.
        quantization: int8 or fp8: the language model's weights in 8 bits.
    """

    name: Literal["nvila"] = field(default="nvila", init=False)
    model: str = "Efficient-Large-Model/NVILA-Lite-2B-Verifier"
    template: Literal["raw", "question"] = "raw"
    rank: Literal["word", "margin"] = "word"
    batch_size: BatchSize = field(default=8, metadata=EXECUTION)
    dtype: str = "bfloat16"
    devices: tuple[DeviceId, ...] | None = field(default=None, metadata=EXECUTION)
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)


@dataclass(frozen=True)
class RewardVerifierConfig(LocalVerifierConfig):
    """The original's image verifier in this process: Qwen2.5-VL with a reward head.

    Attributes:
        model: folder of the original's checkpoint (``model_config.json`` and ``checkpoint-N``), one ``checkpoint-N``,
            or the Hub id of either. Without ``model_config.json`` most of what it says is taken from the other files,
            and a warning says what is assumed.
        step: which ``checkpoint-N``; null: the latest.
        base: folder or Hub id of the model it was trained from, instead of what the checkpoint names.
        dtype: number type of the weights and activations, bfloat16 or float32.
        batch_size: images scored at once; the last batch is filled up.
        mrope: multimodal rotary positions; the original trains and scores without.
        merge_lora: add the LoRA to the weights (faster); else it is kept apart.
        prompt_file: the wording around ``$prompt`` that the model was trained with. Without it the prompt stands alone
            where ``model_config.json`` says so (``prompt_template_type: none``), else in the ``prompt.md`` that
            ``rflow train`` leaves with a checkpoint, or in the wording shipped here.
        max_pixels: of a picture; null: what the model was trained with.
        devices: numbers of the devices that the model takes for itself, as JAX counts them; several share its weights.
            null: the first one, with whatever else is there.
        quantization: int8 or fp8: the language model's weights in 8 bits.
        token: whose hidden state is scored: last, mean or special; null: what the checkpoint says.
        lora_alpha: strength of the LoRA; null: what the checkpoint says.
        mean, std: of the scores, to normalise them; null: what the checkpoint says.
    """

    name: Literal["reward"] = field(default="reward", init=False)
    model: str = field(metadata=CHECKPOINT)
    step: CountOrZero | None = None
    base: str | None = None
    dtype: str = "bfloat16"
    batch_size: BatchSize = field(default=8, metadata=EXECUTION)
    mrope: bool = False
    merge_lora: bool = True
    prompt_file: str | None = None
    max_pixels: Pixels | None = None
    devices: tuple[DeviceId, ...] | None = field(default=None, metadata=EXECUTION)
    quantization: Quantization | None = None
    token: Literal["last", "mean", "special"] | None = field(default=None, metadata=LATER)
    lora_alpha: Positive | None = field(default=None, metadata=LATER)
    mean: Finite | None = field(default=None, metadata=LATER)
    std: Positive | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)
        if (self.mean is None) != (self.std is None):
            raise InputError("give mean and std together, or neither")

    @property
    def stated(self) -> dict[str, Any]:
        """What is known of the model beside what its checkpoint says, by the names of ``RewardConfig``."""
        given = {"token": self.token, "alpha": self.lora_alpha, "mean": self.mean, "std": self.std}
        given["max_pixels"] = self.max_pixels
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ClipVerifierConfig(LocalVerifierConfig):
    """CLIP's score in this process.

    Attributes:
        model: a folder of Transformers, or an id on the Hub.
        implementation: "transformers" (its Flax model), "own", or "auto": the first where it is available.
        batch_size: images judged together.
        dtype: number type of the activations (with "own" also of the weights), bfloat16 or float32.
    """

    name: Literal["clip"] = field(default="clip", init=False)
    model: str = "openai/clip-vit-large-patch14"
    implementation: Literal["auto", "transformers", "own"] = "auto"
    batch_size: BatchSize = field(default=32, metadata=EXECUTION)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)


@dataclass(frozen=True)
class ChecklistVerifierConfig(LocalVerifierConfig):
    """A Qwen2.5-VL in this process that is asked yes or no about each part of a prompt; the score is the share of yes.

    Attributes:
        model: a folder of Transformers or of ``rflow convert qwen``, or a Hub id.
        questions: what takes a prompt apart: ``shapes``, for prompts about colored shapes, or package.module:function,
            which gets an image's metadata and returns a list of ``rflow_jax.verifiers.findings.Question``.
        batch_size: questions answered together, and images of a call.
        dtype: number type of the weights and activations, bfloat16 or float32.
        max_pixels: of a picture; null: the model's own limit.
        devices: numbers of the devices that the model takes for itself, as JAX counts them; several share its weights.
            null: the first one, with whatever else is there.
        quantization: int8 or fp8: the language model's weights in 8 bits.
        adapter: folder of a LoRA that PEFT or ``rflow train`` (task ``sft``) wrote; it is added to the weights.
    """

    name: Literal["checklist"] = field(default="checklist", init=False)
    model: str = field(metadata=CHECKPOINT)
    questions: str = "shapes"
    batch_size: BatchSize = field(default=32, metadata=EXECUTION)
    dtype: str = "bfloat16"
    max_pixels: Pixels | None = None
    devices: tuple[DeviceId, ...] | None = field(default=None, metadata=EXECUTION)
    quantization: Quantization | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)


@dataclass(frozen=True)
class EnsembleVerifierConfig(VerifierConfig):
    """Several verifiers, whose rankings are combined.

    Attributes:
        members: a section like this one each, with its name and settings.
        weights: how much each member counts; empty: all alike.
    """

    name: Literal["ensemble"] = field(default="ensemble", init=False)
    members: tuple[VerifierConfig, ...] = ()
    weights: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        if not self.members:
            raise InputError("members: give some, such as [{name: nvila}, {name: clip}]")
        if wrong := [one.name for one in self.members if isinstance(one, EnsembleVerifierConfig | NoVerifierConfig)]:
            raise InputError(f"members: a member cannot be {wrong[0]}")
        require_ranges(self)
        if self.weights and len(self.weights) != len(self.members):
            raise InputError(
                f"weights is {list(self.weights)}: give a number above 0 for each of the {len(self.members)} members"
            )

    @property
    def member_weights(self) -> tuple[float, ...]:
        """One for each member."""
        return self.weights or (1.0,) * len(self.members)

    @property
    def claimed_devices(self) -> tuple[Sequence[int], ...]:
        """Those of its members."""
        return tuple(claim for member in self.members for claim in member.claimed_devices)


@dataclass(frozen=True)
class NoVerifierConfig(VerifierConfig):
    """Images without scores (``rflow noise`` only)."""

    name: Literal["none"] = field(default="none", init=False)


@dataclass(frozen=True)
class PluginVerifierConfig(Endpoint, PluginOptions, VerifierConfig):
    """A class of your own, which is made as ``Class(config, meter)`` and follows ``Verifier``.

    Attributes:
        name: package.module:Class.
        options: what the class makes of it; ``devices: [1]`` keeps the generator off these devices.
    """

    name: str = field(kw_only=True)
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_secret(self.options, "options")


VERIFIERS = Registry(
    "verifier",
    VerifierConfig,
    "openai",
    {
        "openai": (OpenAIVerifierConfig, "rflow_jax.verifiers.openai:OpenAIVerifier"),
        "yesno": (YesNoVerifierConfig, "rflow_jax.verifiers.yesno:YesNoVerifier"),
        "nvila": (NvilaVerifierConfig, "rflow_jax.verifiers.nvila:NvilaVerifier"),
        "reward": (RewardVerifierConfig, "rflow_jax.verifiers.reward:RewardVerifier"),
        "clip": (ClipVerifierConfig, "rflow_jax.verifiers.clip:CLIPVerifier"),
        "checklist": (ChecklistVerifierConfig, "rflow_jax.verifiers.checklist:ChecklistVerifier"),
        "ensemble": (EnsembleVerifierConfig, "rflow_jax.verifiers.ensemble:EnsembleVerifier"),
        "none": (NoVerifierConfig, ""),
    },
    PluginVerifierConfig,
    Endpoint,
)


def members_of(config: VerifierConfig) -> tuple[VerifierConfig, ...]:
    """Those of an ensemble; of any other verifier itself."""
    return config.members if isinstance(config, EnsembleVerifierConfig) else (config,)
