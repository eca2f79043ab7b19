"""The image verifier in this process: Qwen2.5-VL with a reward head, as the original trains it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.models.quantization import quantize
from rflow_jax.models.qwen2_5_vl.model import LANGUAGE_LINEARS
from rflow_jax.parallel.sharding import on_devices, on_mesh_of
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.utils.checks import require_dtype
from rflow_jax.verifiers.base import BATCHES_A_CALL, Verdict, score_each, unscored_number
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.vlm.qwen_batching import QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_chat import batches
from rflow_jax.vlm.qwen_processing import QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import Scoring, rewards
from rflow_jax.weights.hub import resolve_reward, short_name
from rflow_jax.weights.reward import RewardCheckpoint
from rflow_jax.weights.reward_config import PROMPT_FILE, SPECIAL_TOKEN, RewardConfig
from rflow_jax.writers.prompt_template import read_prompt

PROMPT = Path(__file__).parent / "prompts" / "reward.md"
log = logging.getLogger(__name__)


class RewardVerifier:
    """Scores images in batches; the score is the reward, normalised where the checkpoint has the numbers.

    Raises:
        InputError: the checkpoint is missing or not usable.
    """

    concurrency = 1
    batches_a_call = BATCHES_A_CALL

    def __init__(self, config: RewardVerifierConfig):
        folder = resolve_reward(config.model, config.step)
        checkpoint = RewardCheckpoint.open(folder, step=config.step, base=config.base, stated=config.stated)
        local = Path(config.model).expanduser().exists()
        name = checkpoint.folder.name if local else short_name(config.model).removesuffix(f"/{checkpoint.step.name}")
        self.name = f"reward {name} {checkpoint.step.name}"
        self.batch_size = config.batch_size
        self._closed = threading.Event()
        self._norm = checkpoint.config
        beside = checkpoint.folder / PROMPT_FILE
        prompt_file = config.prompt_file or (str(beside) if beside.is_file() else None)
        self._template = read_template(checkpoint.config, prompt_file)
        added = [SPECIAL_TOKEN] if checkpoint.config.special_tokens else []
        tokenizer = QwenTokenizer(checkpoint.tokenizer, template_from=checkpoint.base, added=added)
        model = checkpoint.load(
            dtype=getattr(jnp, require_dtype(config.dtype)),
            merge=config.merge_lora,
            sharding_for=on_devices(config.devices),
        )
        quantize(model, config.quantization, LANGUAGE_LINEARS)
        sizes = model.config
        special, rows = None, sizes.language.vocab_size
        if checkpoint.config.special_tokens:
            special = tokenizer.id_of(SPECIAL_TOKEN)
            if special is None or special >= rows:
                raise InputError(f"{checkpoint.step}: the embedding has {rows} rows, none for {SPECIAL_TOKEN}")
        self._scoring = Scoring(checkpoint.config.token, special, mrope=config.mrope)
        self.prepare = QwenProcessor(
            tokenizer,
            read_image_processor_config(checkpoint.base, sizes),
            sizes,
            sizes.language.max_position_embeddings,
            checkpoint.config.max_pixels if config.max_pixels is None else config.max_pixels,
        )
        self._graph, self._state = nnx.split(model)

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order.

        An image that cannot be decoded, a prompt that is too long or names special tokens, and a reward that is not
        a number are errors of that image alone.
        """
        return score_each(images, items, self._sample, self._verdicts, batch_size=self.batch_size, closed=self._closed)

    def close(self) -> None:
        """Cancels what a running call has not begun; those images are unscored, with ``CLOSED`` as the reason."""
        self._closed.set()

    def _sample(self, image: Image, prompt: str) -> QwenSample:
        self.prepare.tokenizer.require_plain(prompt)  # the wording around it may contain the token that is scored
        return self.prepare.sample((image, self._template.safe_substitute(prompt=prompt)))

    def _verdicts(self, samples: Sequence[QwenSample]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for batch in batches(samples, self.batch_size):
            own, config = list(batch.values()), self.prepare.config
            sizes = Sizes.bucketed(own, config, self.batch_size)
            inputs = batch_of(own, config, pad=self.prepare.tokenizer.pad, sizes=sizes)
            with on_mesh_of(self._state):
                raw = rewards(self._graph, self.prepare.rules, self._scoring, self._state, inputs)
            for k, row in zip(batch, np.asarray(raw, np.float64), strict=False):
                score = float(row[0])  # the first number is the score; the original has one
                verdicts[k] = unscored_number("reward")
                if math.isfinite(score):
                    verdicts[k] = Verdict(score=self._norm.normalised(score), raw=row.tolist())
        return [verdicts[k] for k in range(len(samples))]


def read_template(config: RewardConfig, prompt_file: str | None) -> Template:
    """The text around ``$prompt``, which ends in the special token where the model has one.

    Raises:
        InputError: the file cannot be read, does not contain ``$prompt``, or contains the special token twice.
    """
    text = "$prompt"
    if prompt_file or config.template != "none":
        path = Path(prompt_file) if prompt_file else PROMPT
        text = read_prompt(path).strip()
        if "prompt" not in Template(text).get_identifiers():
            raise InputError(f"{path}: does not contain $prompt")
        if not prompt_file:
            log.warning(
                "the reward model was trained with the wording %r; its scores are best with that very text: give it as "
                "prompt_file",
                config.template,
            )
    if config.special_tokens and text.count(SPECIAL_TOKEN) > 1:
        raise InputError(f"{prompt_file}: contains {SPECIAL_TOKEN} more than once; one is scored")
    missing = config.special_tokens and SPECIAL_TOKEN not in text
    return Template(f"{text} {SPECIAL_TOKEN}" if missing else text)
