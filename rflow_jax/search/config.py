"""What a search is told: one YAML file, or the flags of ``infer.py noise`` and ``infer.py reflect``."""

from dataclasses import dataclass, field

from rflow_jax.errors import InputError
from rflow_jax.language.http import WriterConfig
from rflow_jax.settings import Settings, require_dtype
from rflow_jax.verifiers.openai import VerifierConfig

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Stage:
    """The size of one stage of a search.

    Attributes:
        search_rounds: rounds of the stage.
        search_branch: images of each prompt in a round.
    """

    search_rounds: int = 16
    search_branch: int = 2

    def __post_init__(self) -> None:
        if self.search_rounds < 1 or self.search_branch < 1:
            raise InputError("search_rounds and search_branch must be at least 1")


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
        noise: images from fresh noise: all of ``noise``, and the first stage of ``reflect``.
        reflect: corrections that follow in ``reflect``.
        settings: how an image is generated.
        verifier: who scores the images.
        reflector: who writes the reflections.
        refiner: who refines the prompts.
    """

    model: str
    lora: str | None = None
    lora_alpha: float | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    prompts_in_flight: int = 16
    noise: Stage = field(default_factory=Stage)
    reflect: Stage = field(default_factory=Stage)
    settings: Settings = field(default_factory=Settings)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    reflector: WriterConfig = field(default_factory=WriterConfig)
    refiner: WriterConfig = field(default_factory=WriterConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed is {self.seed}: give a number from 0 to {LARGEST_SEED}")
        if self.prompts_in_flight < 1:
            raise InputError("prompts_in_flight must be at least 1")
        require_dtype(self.dtype)

    def require_reflect(self) -> None:
        """Checks what only ``reflect`` needs.

        Raises:
            InputError: no corrector, no verifier, or more branches than images to choose them from.
        """
        if self.lora is None:
            raise InputError("reflect corrects images with a LoRA: set lora")
        if self.verifier.name == "none":
            raise InputError("reflect chooses images by their scores: verifier.name none serves noise only")
        images = self.noise.search_rounds * self.noise.search_branch
        if images < self.reflect.search_branch:
            raise InputError(
                f"reflect.search_branch is {self.reflect.search_branch}, but the noise stage makes only "
                f"{images} images a prompt: raise noise.search_rounds or noise.search_branch"
            )
