"""Lower bounds on a step's time: operations, memory traffic and link traffic, each over a chip's published rate.

A roofline, not a prediction: no factor is fitted to anything; kernels below their peak, element-wise work and
latencies are left out. :func:`compared` gives the ratio of steps measured on H100 and H200 to the same formula. No
step was measured on a TPU: times of TPUs are unverified, and their ratio need not be that of a GPU.

What passes through a chip's memory (:func:`flux_bytes`) is, for each pass over the blocks, every weight once, and for
each token and block the operands and results of products and attention once: 12 d + 2 m numbers for a width d and a
feed-forward width m (the input read; q, k, v written and read; attention written and read; its product written; the
feed-forward part's input read, its middle written and read, its result written). A training step has a forward pass,
one more with recomputation, and a backward pass, which passes the weights once and the numbers twice: the kept ones
and their gradients.

Encoders: convolutions, products and attention; norms, softmax and embeddings are left out throughout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rflow_jax.aot.chips import H100, H200, Chip
from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.clip import ClipVisionConfig
from rflow_jax.models.flops import encoder_flops
from rflow_jax.models.flux.config import FluxConfig, block_weights, forward_flops, training_flops
from rflow_jax.models.options import Remat
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import VisionConfig
from rflow_jax.models.siglip import SiglipVisionConfig

BF16 = 2  # bytes


@dataclass(frozen=True)
class StepEstimate:
    """The bounds of a step, and their inputs.

    Attributes:
        chip: name of a chip.
        flops: operations of all chips together.
        hbm_bytes, ici_bytes, dcn_bytes: bytes that a chip moves: through its memory, to its slice, to other slices.
        compute_s, memory_s, ici_s, dcn_s: seconds for each.
    """

    chip: str
    chips: int
    flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float
    compute_s: float
    memory_s: float
    ici_s: float
    dcn_s: float

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, f"{name}_s") for name in ("compute", "memory", "ici", "dcn")}

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def seconds(self) -> float:
        """The time with all parts at once: no step is faster."""
        return max(self.parts.values())

    @property
    def seconds_no_overlap(self) -> float:
        """The time with one part after another."""
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        results = {"bound": self.bound, "seconds": self.seconds, "seconds_no_overlap": self.seconds_no_overlap}
        return asdict(self) | results


def estimate(
    chip: Chip,
    chips: int,
    flops: float | int,
    *,
    hbm_bytes: float | int = 0,
    ici_bytes: float | int = 0,
    dcn_bytes: float | int = 0,
) -> StepEstimate:
    """Estimates a step whose arithmetic is spread evenly over chips.

    Args:
        chips: chips, not JAX devices (see :attr:`rflow_jax.aot.chips.Chip.devices`).
        flops: of all chips together.
        hbm_bytes, ici_bytes, dcn_bytes: of one chip; those of its devices added up.

    Raises:
        InputError: no chips, or something is sent between slices and no rate for it is published.
    """
    if chips < 1:
        raise InputError(f"chips: {chips}; expected a number above 0")
    if dcn_bytes and chip.dcn_rate is None:
        raise InputError(f"{chip.name}: no rate between slices is published, so {dcn_bytes:.3g} bytes have no time")
    return StepEstimate(
        chip.name,
        chips,
        float(flops),
        float(hbm_bytes),
        float(ici_bytes),
        float(dcn_bytes),
        compute_s=flops / chips / chip.flops,
        memory_s=hbm_bytes / chip.hbm_rate,
        ici_s=ici_bytes / chip.link_rate,
        dcn_s=dcn_bytes / chip.dcn_rate if chip.dcn_rate else 0.0,
    )


def flux_bytes(
    config: FluxConfig,
    *,
    tokens: int,
    samples: float | int,
    training: bool = False,
    remat: Remat = "full",
    parts: int = 1,
    width: int = BF16,
) -> float:
    """Bytes through a chip's memory in one step of FLUX, by the formula in this module's docstring.

    Args:
        tokens: of a sample: text, image and condition.
        samples: a chip computes in a step.
        parts: number of chips that share each weight and each sample's computation (tensor parallelism). FSDP's weights
            are gathered, and pass whole: 1.
        width: bytes of a number.
    """
    again = remat != "none"
    weight_passes, token_passes = (2 + again, 3 + again) if training else (1, 1)
    blocks = config.num_layers + config.num_single_layers
    numbers = samples * tokens * blocks * (12 * config.width + 2 * config.mlp_width)
    return width * (weight_passes * block_weights(config) + token_passes * numbers) / parts


def fsdp_bytes(config: FluxConfig, *, devices: int, remat: Remat = "full", width: int = BF16) -> float:
    """What a chip sends in a training step to gather the blocks' weights, once for each pass; gradients are a LoRA's.

    For a compiled program, :func:`rflow_jax.aot.hlo.read_program` gives the actual bytes.
    """
    return width * (2 + (remat != "none")) * block_weights(config) * (devices - 1) / devices


# ---- Encoders and verifiers ----


def picture_flops(config: ClipVisionConfig | SiglipVisionConfig, *, class_token: bool) -> float:
    """Operations of CLIP's vision model (which has a class token) or of SigLIP's tower for one picture."""
    patches = (config.image_size // config.patch_size) ** 2
    embedding = 2 * patches * config.num_channels * config.patch_size**2 * config.hidden_size
    return float(embedding) + encoder_flops(config, patches + class_token)


def autoencoder_flops(config: AutoencoderConfig, height: int, width: int, *, decode: bool) -> float:
    """Operations of the VAE's encoder or decoder for one picture of these pixels: convolutions and the mid attention.

    Products with the zeros at the edges are counted, which XLA does not.
    """
    channels = config.block_out_channels
    side, last = 2 ** (len(channels) - 1), len(channels) - 1
    lowest, top = height * width // side**2, channels[-1]
    mid = 2 * _resnet(lowest, top, top)
    if config.mid_block_add_attention:
        mid += 2 * lowest * 4 * top * top + 4 * lowest * lowest * top
    if decode:
        total = mid + _conv(lowest, config.latent_channels, top)
        total += _conv(height * width, channels[0], config.out_channels)
        levels, count = channels[::-1], config.layers_per_block + 1
    else:
        total = mid + _conv(height * width, config.in_channels, channels[0])
        total += _conv(lowest, top, 2 * config.latent_channels)
        levels, count = channels, config.layers_per_block
    before = levels[0]
    for level, c in enumerate(levels):
        scale = 4 ** (last - level) if decode else 4**level
        pixels = height * width // scale
        total += _resnet(pixels, before, c) + (count - 1) * _resnet(pixels, c, c)
        if level < last:  # the convolution of a changed resolution works at the new one
            total += _conv(pixels * 4 if decode else pixels // 4, c, c)
        before = c
    return float(total)


def _conv(pixels: int, c_in: int, c_out: int, side: int = 3) -> int:
    return 2 * pixels * side * side * c_in * c_out


def _resnet(pixels: int, c_in: int, c_out: int) -> int:
    shortcut = _conv(pixels, c_in, c_out, 1) if c_in != c_out else 0
    return _conv(pixels, c_in, c_out) + _conv(pixels, c_out, c_out) + shortcut


def qwen2_flops(config: Qwen2Config, tokens: int, *, past: int = 0, logits: int = 0) -> float:
    """Operations of the language model for one sample.

    Args:
        tokens: computed at once. Each attends to those before it and to itself, so about half of all pairs count.
        past: tokens in the cache, which all of them see.
        logits: tokens whose logits are made.
    """
    h, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    weights = h * (2 * inner + 2 * shared + 3 * config.intermediate_size)
    pairs = tokens * past + tokens * (tokens + 1) / 2
    blocks = config.num_hidden_layers * (2 * tokens * weights + 4 * pairs * inner)
    return float(blocks + 2 * logits * h * config.vocab_size)


def qwen_vision_flops(config: VisionConfig, patches: int) -> float:
    """Operations of Qwen2.5-VL's tower for one picture; a window is counted as full."""
    d = config.hidden_size
    weights = 4 * d * d + 3 * d * config.intermediate_size
    whole = len([index for index in config.fullatt_block_indexes if index < config.depth])
    window = min(config.window_units**2 * config.unit, patches)
    attention = 4 * patches * d * (whole * patches + (config.depth - whole) * window)
    wide = d * config.unit
    merger = 2 * (patches // config.unit) * wide * (wide + config.out_hidden_size)
    return float(config.depth * 2 * patches * weights + attention + 2 * patches * config.patch_values * d + merger)


def nvila_projector_flops(vision_width: int, width: int, tokens: int) -> float:
    """Operations of NVILA's projector, whose tokens are nine patches each."""
    deep, middle = 9 * vision_width, 3 * vision_width
    return float(2 * tokens * (deep * middle + middle * width + width * width))


# ---- What was measured ----


@dataclass(frozen=True)
class Measured:
    """A timed step of FLUX.1-dev: 1024 px, 512 text tokens, bfloat16, random weights.

    Attributes:
        condition: whether there was a condition of 512 px.
        batch: samples of the step, over all chips.
        training: a LoRA's training step with rematerialised blocks; else a denoising step.
        conditions: further settings of the measurement.
        source: the document that has the figure.
    """

    name: str
    chip: Chip
    chips: int
    batch: int
    condition: bool
    training: bool
    seconds: float
    conditions: str
    source: str


_STEP = "JAX 0.11.2, a LoRA of rank 32, median of 4 calls of 5 steps; modulations still made in every step"
_STEP_SOURCE = "docs/performance.md, One denoising step, 2026-11-23"
_LATER = "JAX 0.11.2, a LoRA of rank 32, modulations of all steps made before the first"
_TRAIN = "JAX 0.11.2, a LoRA of rank 32 in float32, Prodigy, remat full, samples already encoded"
_TRAIN_SOURCE = "docs/performance.md, One training step, 2026-11-25"
MEASURED = (
    Measured("denoising, batch 1", H100, 1, 1, False, False, 0.1371, _STEP, _STEP_SOURCE),
    Measured("denoising with a condition, batch 1", H100, 1, 1, True, False, 0.1776, _STEP, _STEP_SOURCE),
    Measured("denoising, batch 4", H100, 1, 4, False, False, 0.5144, _STEP, _STEP_SOURCE),
    Measured("denoising with a condition, batch 4", H100, 1, 4, True, False, 0.6908, _STEP, _STEP_SOURCE),
    Measured(
        "denoising with a condition, batch 1",
        H200,
        1,
        1,
        True,
        False,
        0.1726,
        _LATER,
        "docs/performance.md, One denoising step, 2026-11-24",
    ),
    Measured("training, batch 1", H100, 1, 1, True, True, 0.6274, _TRAIN, _TRAIN_SOURCE),
    Measured("training, batch 2", H100, 1, 2, True, True, 1.2002, _TRAIN, _TRAIN_SOURCE),
    Measured("training, batch 4", H100, 1, 4, True, True, 2.3617, _TRAIN, _TRAIN_SOURCE),
    Measured("training, batch 4, FSDP over 2", H100, 2, 4, True, True, 1.4909, _TRAIN, _TRAIN_SOURCE),
)
_TEXT, _IMAGE, _CONDITION = 512, 4096, 1024


class Comparison(NamedTuple):
    """A measured step beside its bound; ``ratio`` is measured over estimated, and above 1."""

    name: str
    estimated: float
    measured: float
    ratio: float


def estimate_of(row: Measured) -> StepEstimate:
    """The bound of a measured step, by the formulas that estimates for other chips are made with."""
    config, condition = FluxConfig(), _CONDITION if row.condition else 0
    operations = training_flops if row.training else forward_flops
    flops = operations(config, text=_TEXT, image=_IMAGE, condition=condition)
    tokens = _TEXT + _IMAGE + condition
    passed = flux_bytes(config, tokens=tokens, samples=row.batch / row.chips, training=row.training)
    sent = fsdp_bytes(config, devices=row.chips) if row.training else 0.0
    return estimate(row.chip, row.chips, row.batch * flops, hbm_bytes=passed, ici_bytes=sent)


def compared() -> list[Comparison]:
    """Every measured step beside its bound with perfect overlap: the only known error of these estimates."""
    rows = []
    for row in MEASURED:
        seconds = estimate_of(row).seconds
        name = f"{row.chips} x {row.chip.name}: {row.name}"
        rows.append(Comparison(name, seconds, row.seconds, row.seconds / seconds))
    return rows
