"""What ``infer.py score`` is told."""

import os
from dataclasses import dataclass, field

from rflow_jax.errors import InputError
from rflow_jax.text import require_text
from rflow_jax.verifiers.config import NONE, VerifierConfig


@dataclass(frozen=True)
class ScoreConfig:
    """Which images are scored, against which prompts, by whom.

    Attributes:
        images: image files, or folders. With ``prompt`` a folder's own images are scored; without, a folder is one
            of a search or laid out like GenEval's, and every image is scored against its prompt's metadata.jsonl.
        prompt: of all images.
        prompts: JSON lines of {"image", "prompt", ...} instead of both; paths from the file's folder.
        samples: which images of each prompt in a folder: samples, midimg (all of a search), samples_best, nfe4, ...
        out: JSON lines with the whole verdicts. Images whose scores it holds, of the same bytes, prompt and verifier,
            are not scored again.
        again: score all of them again.
        verifier: who scores.
    """

    images: list[str] = field(default_factory=list)
    prompt: str | None = None
    prompts: str | None = None
    samples: str = "samples"
    out: str | None = None
    again: bool = False
    verifier: VerifierConfig = field(default_factory=VerifierConfig)

    def __post_init__(self) -> None:
        if self.prompts is None and not self.images:
            raise InputError("no images: give files with --prompt, the folder of a search, or --prompts FILE")
        if self.prompts is not None and (self.images or self.prompt is not None):
            raise InputError("prompts names images and their prompts: leave out the other images and prompt")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("prompt is empty")
        require_text(self.prompt or "", "prompt")
        if self.prompts is not None and self.out and os.path.realpath(self.out) == os.path.realpath(self.prompts):
            raise InputError("out is the list of prompts: give another file")
        if self.verifier.name == NONE:
            raise InputError("verifier.name is none: name one that scores")
