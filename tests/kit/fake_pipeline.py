"""A pipeline without a model: small pictures that follow from everything that the real one depends on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from PIL.Image import Image

import rflow_jax.generation.pipeline
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Made, NotFiniteError, Pending, Request
from rflow_jax.generation.sampling import Sampled


@dataclass(frozen=True)
class Batch:
    """What was sent on its way together.

    Attributes:
        behind: batches that were on their way already.
    """

    lora: bool
    requests: list[Request]
    behind: int


@dataclass
class Log:
    """The batches of a pipeline and of the same without its LoRA."""

    batches: list[Batch] = field(default_factory=list)
    on_their_way: int = 0


@dataclass(frozen=True)
class FakePending(Pending):
    """A batch on its way."""

    made: list[Made]
    log: Log
    wait: Callable[[], None]

    def images(self) -> list[Made]:
        """The pictures, after a while."""
        self.wait()
        self.log.on_their_way -= 1
        return self.made


@dataclass
class FakePipeline:
    """Has the interface of ``rflow_jax.generation.pipeline.Pipeline`` and remembers its batches.

    Attributes:
        before: told the requests of each batch before it starts; may raise.
        wait: what the device does in the meantime.
        fails: why there is no image, for requests that fail.
    """

    lora: bool = True
    replicas: int = 1
    before: Callable[[Sequence[Request]], None] = lambda requests: None
    wait: Callable[[], None] = lambda: None
    fails: Callable[[Request], str | None] = lambda request: None
    log: Log = field(default_factory=Log)
    thread: int = field(default_factory=threading.get_ident)
    loaded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bare = replace(self, lora=False) if self.lora else self

    @property
    def batches(self) -> list[Batch]:
        """In the order in which they were sent."""
        return self.log.batches

    @property
    def requests(self) -> list[Request]:
        """Of all batches."""
        return [request for batch in self.log.batches for request in batch.requests]

    def images_at_once(self, settings: SamplingConfig) -> int:
        """Images of one batch."""
        return settings.batch_size * self.replicas

    def resolve(self, settings: SamplingConfig) -> SamplingConfig:
        """The settings with FLUX.1-dev's numbers where they leave these open."""
        steps, length = settings.num_inference_steps or 30, settings.max_sequence_length or 512
        return replace(settings, num_inference_steps=steps, max_sequence_length=length)

    def without_lora(self) -> FakePipeline:
        """The same without the corrector, and the same object each time; batches are remembered together."""
        return self._bare

    def start(self, requests: Sequence[Request], settings: SamplingConfig) -> FakePending:
        """Sends a batch on its way."""
        assert threading.get_ident() == self.thread, "a generator is fed by one thread"
        assert 0 < len(requests) <= self.images_at_once(settings)
        assert len({request.condition is None for request in requests}) == 1
        self.before(requests)
        self.batches.append(Batch(self.lora, list(requests), self.log.on_their_way))
        self.log.on_their_way += 1
        made = [self.fails(request) or picture(request, self.lora, settings) for request in requests]
        return FakePending(len(made), Sampled(*[jnp.zeros(0)] * 3), made, self.log, self.wait)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Any],
        conditions: Sequence[Image | None] | None = None,
        reflections: Sequence[str | None] | None = None,
        refined_prompts: Sequence[str | None] | None = None,
        settings: SamplingConfig = SamplingConfig(),
        on_images: Callable[[int, list[Image]], None] | None = None,
    ) -> list[Image]:
        """One picture a prompt, in batches."""
        columns = [[None] * len(prompts) if c is None else c for c in (conditions, reflections, refined_prompts)]
        requests = [Request(*row) for row in zip(prompts, seeds, *columns, strict=True)]
        size = self.images_at_once(settings)
        made: list[Made] = []
        for first in range(0, len(requests), size):
            for place, image in enumerate(self.start(requests[first : first + size], settings).images(), first):
                if on_images and not isinstance(image, str):
                    on_images(place, [image])
                made.append(image)
        if failed := {place: image for place, image in enumerate(made) if isinstance(image, str)}:
            raise NotFiniteError(failed, len(made))
        return [image for image in made if not isinstance(image, str)]


def picture(request: Request, lora: bool, settings: SamplingConfig) -> Image:
    """Another one for any other input; only the size of the batch changes nothing."""
    condition = request.condition and hashlib.sha256(request.condition.tobytes()).hexdigest()
    key = (lora, replace(request, condition=None), condition, replace(settings, batch_size=1))
    rng = np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))
    return PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))


def instead_of_loading(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """The pipeline that ``load_pipeline`` gives from now on."""
    fake = FakePipeline()
    monkeypatch.setattr(rflow_jax.generation.pipeline, "load_pipeline", lambda model, **more: fake)
    return fake
