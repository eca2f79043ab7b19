"""The configuration of a search: one YAML file, or the flags of ``rflow noise``, ``noise-prompt`` and ``reflect``."""

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.openai_client.endpoint import Connection
from rflow_jax.parallel.layout import DistributedConfig, MeshConfig
from rflow_jax.search import strategies
from rflow_jax.search.strategies import Strategy
from rflow_jax.utils.checks import require_dtype
from rflow_jax.utils.ranges import (
    Between,
    Count,
    CountOrZero,
    DeviceId,
    Devices,
    Finite,
    Position,
    Positive,
    Seed,
    SmallCount,
    require_ranges,
)
from rflow_jax.utils.registry import EXECUTION
from rflow_jax.verifiers.config import (
    VERIFIERS,
    EnsembleVerifierConfig,
    NoVerifierConfig,
    OpenAIVerifierConfig,
    VerifierConfig,
    members_of,
)
from rflow_jax.writers.base import WRITERS, HttpTextGeneratorConfig, TextGeneratorConfig

Kind = Literal["noise", "noise-prompt", "reflect"]
RECIPE = "shapes"  # where neither a configuration nor a model is named: the models that come with the package


@dataclass(frozen=True)
class NoiseStage:
    """The images before any correction.

    Attributes:
        search_rounds: rounds of the stage.
        search_branch: images of each prompt in a round.
        method: "random": all from fresh noise; "zero_order": after the first round, neighbours of the best noise so
            far.
        noise_similarity: cosine of the angle between a neighbour and the noise it is near (zero_order).
    """

    search_rounds: SmallCount = 16
    search_branch: SmallCount = 2
    method: Literal["random", "zero_order"] = "random"
    noise_similarity: Between = 0.95

    def __post_init__(self) -> None:
        require_ranges(self, "noise")


@dataclass(frozen=True)
class ReflectStage:
    """The corrections that follow.

    Attributes:
        search_rounds: rounds of the stage: its depth.
        search_branch: images of each prompt that are corrected in a round: its width.
        history: the number of earlier images of the chain that are shown, with their reflections, to the reflection
            generator beside the current one.
        include_initial_images: an image from before the first correction can be the best of its chain and of all; false
            is the accounting of the original.
    """

    search_rounds: SmallCount = 16
    search_branch: SmallCount = 2
    history: CountOrZero = 0
    include_initial_images: bool = True

    def __post_init__(self) -> None:
        require_ranges(self, "reflect")


@dataclass(frozen=True)
class SearchConfig:
    """A search over the images of many prompts.

    Attributes:
        model: the pipeline: a converted or diffusers-layout folder, or a Hub id.
        lora: the corrector's LoRA file or folder; used by reflect only.
        lora_alpha: its alpha, for files that do not say; null is the rank.
        dtype: number type of the weights and activations, bfloat16 or float32.
        seed: every image's noise derives from it.
        prompts_in_flight: prompts searched together; batches are filled across them.
        noise: the first images: all of ``noise`` and ``noise-prompt``, and the first stage of ``reflect``.
        reflect: corrections that follow in ``reflect``.
        stop_score: a prompt is done once an image reaches this score; null goes through all rounds.
        max_images: images made for a prompt at most; null for as many as the rounds ask for.
        budget: US dollars, by the prices of the endpoints, after which no further question is asked; null: no limit.
        mesh: how the devices of this machine are laid out; along ``data`` each makes images of its own.
        scan_blocks: stack the transformer's blocks and loop over them: a program that compiles in a fraction of the
            time; null: on TPU.
        sampling: how an image is generated; ``--height`` and so on are short for ``--sampling.height``.
        verifier: who scores the images.
        reflector: who writes the reflections.
        refiner: who refines the prompts.
    """

    model: str
    lora: str | None = None
    lora_alpha: Positive | None = None
    dtype: str = "bfloat16"
    seed: Seed = 0
    prompts_in_flight: SmallCount = field(default=16, metadata=EXECUTION)
    noise: NoiseStage = field(default_factory=NoiseStage)
    reflect: ReflectStage = field(default_factory=ReflectStage)
    stop_score: Finite | None = None
    max_images: Count | None = None
    budget: Positive | None = field(default=None, metadata=EXECUTION)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=EXECUTION)
    scan_blocks: bool | None = field(default=None, metadata=EXECUTION)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    verifier: VerifierConfig = field(default_factory=OpenAIVerifierConfig, metadata={"registry": VERIFIERS})
    reflector: TextGeneratorConfig = field(default_factory=HttpTextGeneratorConfig, metadata={"registry": WRITERS})
    refiner: TextGeneratorConfig = field(default_factory=HttpTextGeneratorConfig, metadata={"registry": WRITERS})

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)

    def require_fit(self, kind: Kind, given: bool) -> None:
        """Checks what one kind of search needs.

        Args:
            given: whether the first images come from a folder.

        Raises:
            InputError: no corrector, no verifier, more branches than images to choose them from, or a budget in dollars
                where the price of an answer is not known.
        """
        judged = not isinstance(self.verifier, NoVerifierConfig)
        if not judged and (kind != "noise" or self.noise.method != "random" or self.stop_score is not None):
            raise InputError(
                f"{kind} chooses or improves images by their verdicts: verifier.name none serves random noise only"
            )
        if self.stop_score is not None and isinstance(self.verifier, EnsembleVerifierConfig):
            raise InputError("stop_score: an ensemble ranks the images of a prompt, and has no score to stop at")
        if kind == "noise-prompt" and self.noise.method != "random":
            raise InputError("noise.method is zero_order: noise-prompt takes fresh noise; set it to random")
        for role, model in self.roles(kind).items() if self.budget is not None else ():
            # Models in this process cost nothing, and a class of the user's own may count its cost itself.
            models = members_of(model) if isinstance(model, VerifierConfig) else (model,)
            if any(one.asks_endpoint and isinstance(one, Connection) and one.price_input is None for one in models):
                raise InputError(
                    f"budget counts dollars, and the price of {role} is not known: set {role}.price_input and "
                    f"{role}.price_output (0 for a server of your own)"
                )
        if kind != "reflect":
            return
        if self.lora is None:
            raise InputError("reflect corrects images with a LoRA: set lora")
        images = self.noise.search_rounds * self.noise.search_branch
        if not given and images < self.reflect.search_branch:
            raise InputError(
                f"reflect.search_branch is {self.reflect.search_branch}, but the noise stage makes only "
                f"{images} images a prompt: raise noise.search_rounds or noise.search_branch"
            )

    def roles(self, kind: Kind) -> dict[str, VerifierConfig | TextGeneratorConfig]:
        """The models that a search of this kind uses beside its pipeline."""
        roles: dict[str, VerifierConfig | TextGeneratorConfig] = {"verifier": self.verifier}
        if kind == "reflect":
            roles["reflector"] = self.reflector
        if kind != "noise":
            roles["refiner"] = self.refiner
        return roles

    def strategy(self, kind: Kind, given: int | None = None) -> Strategy:
        """The search of one prompt.

        Args:
            given: number of first images that come from a folder, in place of the noise stage.
        """
        rounds, branches = self.noise.search_rounds, self.noise.search_branch
        stages: list[strategies.Stage] = []
        if given is not None:
            stages.append(strategies.GivenImages(1, given))
        elif kind == "noise-prompt":
            stages.append(strategies.RefinedPrompts(rounds, branches))
        elif self.noise.method == "zero_order":
            stages.append(strategies.ZeroOrder(rounds, branches))
        else:
            stages.append(strategies.FreshNoise(rounds, branches))
        if kind == "reflect":
            stages.append(strategies.Corrections(self.reflect.search_rounds, self.reflect.search_branch))
        return Strategy(tuple(stages), self.stop_score, self.max_images)


@dataclass(frozen=True)
class RunConfig:
    """The prompts to search, and the folder of the results.

    Attributes:
        prompts: file with GenEval metadata, one JSON object a line.
        out: folder of the run; a run that was stopped goes on.
        start: first prompt of the file.
        end: the prompt to stop before; null goes on to the last, and so does -1.
        images: folder of an earlier run, ours or the original's: ``reflect`` begins with its images.
        process_index: number of this process, from 0; it takes every ``process_count``-th prompt from this one on.
        process_count: number of processes that share a run and its folder.
        distributed: on a TPU pod: the processes find each other, and share the prompts.
        strategy: written by the command: which search this is.
        probe: whether services are asked a first question before anything is loaded; ``--no-probe`` leaves it out.
    """

    prompts: str = field(metadata=EXECUTION)
    out: str = field(metadata=EXECUTION)
    start: Position = field(default=0, metadata=EXECUTION)
    end: Position | None = field(default=None, metadata=EXECUTION)
    images: str | None = None
    process_index: DeviceId = field(default=0, metadata=EXECUTION)
    process_count: Devices = field(default=1, metadata=EXECUTION)
    distributed: DistributedConfig = field(default_factory=DistributedConfig, metadata=EXECUTION)
    strategy: Kind | None = None
    probe: bool = field(default=True, metadata=EXECUTION)

    def __post_init__(self) -> None:
        require_ranges(self)
        if not 0 <= self.process_index < self.process_count:
            raise InputError(
                f"process_index is {self.process_index}: give a number from 0 to {self.process_count - 1} "
                f"(process_count is {self.process_count})"
            )
