"""Training of the autoencoder as a task: pictures are drawn, encoded, sampled and decoded on the devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, sample_posterior
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.parallel.mesh import put_batch, replicated, traced_on
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.shapes.autoencoder_config import SceneValidationConfig, ShapesAutoencoderRunConfig
from rflow_jax.shapes.judge import read
from rflow_jax.shapes.model import require_pipeline, save_pipeline
from rflow_jax.shapes.numbered_task import NumberedTask
from rflow_jax.shapes.render import pack
from rflow_jax.shapes.scene_table import SceneTable, make_table, sample_scene
from rflow_jax.shapes.scenes import SIZE, THING, Item, Scene
from rflow_jax.training.corrector.step import sample_keys
from rflow_jax.training.partition import on_host
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import MeanMetric, Metrics, StepMetrics, TrainState, compile_step, make_update
from rflow_jax.typing import Array, Float, UInt8, UInt32
from rflow_jax.weights.components import VAE
from rflow_jax.weights.flux import StoredNetwork
from rflow_jax.weights.hub import resolve

SCENE, NOISE = range(2)  # what a sample's key is folded with for each of its draws
MEASURED = 2048  # scenes whose latents give the scale and the shift of an export
HELD_OUT_SEED = 2**32  # of the scenes for validation: no run has it
LATENT_STD = 0.01  # of what is drawn for a picture, beside latents whose own is 1
PLACE, HALF_SIZE = 1.5, 1.0  # pixels by which an item that is read may differ


class Autoencoding(NamedTuple):
    """What becomes of pictures that pass through an autoencoder.

    Attributes:
        error: the squared error of each picture, whose pixels are in [-1, 1].
    """

    mean: Float[Array, "b y x z"]
    logvar: Float[Array, "b y x z"]
    decoded: Float[Array, "b height width 3"]
    error: Float[Array, " b"]


def autoencode(
    network: AutoencoderKL, pictures: UInt8[Array, "b h w 3"], noise: Float[Array, "b y x z"] | None, dtype: Dtype
) -> Autoencoding:
    """Encodes, samples and decodes.

    Args:
        noise: standard normal; None: the mean is decoded.
        dtype: of the activations; what comes out is float32.
    """
    pixels = constrain(pictures.astype(jnp.float32) / 127.5 - 1, BATCH)
    mean, logvar = (part.astype(jnp.float32) for part in network.encode(pixels.astype(dtype)))
    latents = mean if noise is None else sample_posterior(mean, logvar, noise)
    decoded = network.decode(latents.astype(dtype)).astype(jnp.float32)
    return Autoencoding(mean, logvar, decoded, jnp.mean(jnp.square(decoded - pixels), axis=(1, 2, 3)))


def decibels(error: Any, xp: Any) -> Any:
    """The PSNR for a mean squared error of pixels in [-1, 1]; ``xp`` is ``numpy`` or ``jax.numpy``."""
    return 10 * xp.log10(4 / error)


class Measured(NamedTuple):
    """Numbers of each of some scenes.

    Attributes:
        pictures: decoded from the means of the posterior.
        error: of these, as in :class:`Autoencoding`.
        first, second: moments of the means of the posterior: their mean, and that of their squares.
    """

    pictures: UInt8[Array | np.ndarray, "n h w 3"]
    error: Float[Array | np.ndarray, " n"]
    first: Float[Array | np.ndarray, " n"]
    second: Float[Array | np.ndarray, " n"]


class Measurement:
    """Passes scenes through the autoencoder, for validation and for the numbers of an export; one program for both.

    Args:
        batch: scenes at once.
    """

    def __init__(self, graph: nnx.GraphDef, dtype: Dtype, batch: int, mesh: Mesh):
        self._batch, self._mesh = batch, mesh

        def measure(trainable: nnx.State, scenes: SceneTable) -> Measured:
            pictures = scenes.draw(jnp.arange(batch))
            found = autoencode(nnx.merge(graph, trainable), pictures, None, dtype)
            shown = jnp.round(jnp.clip((found.decoded + 1) * 127.5, 0, 255)).astype(jnp.uint8)
            moments = found.mean, jnp.square(found.mean)
            return Measured(shown, found.error, *(jnp.mean(x, axis=(1, 2, 3)) for x in moments))

        self._measure = jax.jit(traced_on(mesh, measure), out_shardings=replicated(mesh))

    def __call__(self, trainable: nnx.State, scenes: SceneTable) -> Measured:
        """The numbers of all scenes, on the host; every process must call it."""
        count, parts = len(scenes.items), []
        for start in range(0, count, self._batch):
            rows = np.arange(start, start + self._batch) % count  # the last part is filled up with others
            part = put_batch(self._mesh, SceneTable(*(x[rows] for x in scenes)), whole=True)
            parts.append(jax.device_get(self._measure(trainable, part)))
        return Measured(*(np.concatenate(part)[:count] for part in zip(*parts, strict=True)))


def shows(scene: Scene, found: Scene) -> bool:
    """Whether a scene that was read is this one: the same shapes and colors, nearly at the same places and sizes."""
    left = list(found.items)
    for item in scene.items:
        same = next((other for other in left if _alike(item, other)), None)
        if same is None:
            return False
        left.remove(same)
    return not left


def _alike(a: Item, b: Item) -> bool:
    near = max(abs(a.x - b.x), abs(a.y - b.y)) <= PLACE and abs(a.half_size - b.half_size) <= HALF_SIZE
    return near and (a.shape, a.color) == (b.shape, b.color) and b.shape != THING


class AutoencoderValidation:
    """Fixed scenes of training prompts that are in no table."""

    def __init__(self, config: SceneValidationConfig, spoiled: float, measure: Measurement):
        self.every, self._measure = config.every, measure
        self._scenes = [sample_scene(HELD_OUT_SEED, number, spoiled) for number in range(config.scenes)]
        self._table = SceneTable(*pack(self._scenes))

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """``validation/psnr`` of decoded means, in decibels, and ``validation/read``: how many show the very scene."""
        found = self._measure(trainable, self._table)
        shown = [shows(scene, read(picture)) for scene, picture in zip(self._scenes, found.pictures, strict=True)]
        return {
            "validation/psnr": float(decibels(found.error.mean(), np)),
            "validation/read": float(np.mean(shown)),
        }


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An :class:`~rflow_jax.training.checkpoints.Exporter` of the whole model with this autoencoder.

    Attributes:
        base: the folder that the other parts are copied from.
        scenes: whose latents are to have mean 0 and standard deviation 1.
    """

    graph: nnx.GraphDef
    base: Path
    measure: Measurement
    scenes: SceneTable

    @property
    def exports(self) -> str:
        return "model/{step}"

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
        """Writes ``model/{step}``."""
        found = self.measure(trainable, self.scenes)
        shift, second = (float(x.mean(dtype=np.float64)) for x in (found.first, found.second))
        network = narrowed(nnx.merge(self.graph, on_host(trainable)))
        if folder is not None:
            scale = {"scaling_factor": (second - shift**2) ** -0.5, "shift_factor": shift}
            save_pipeline(folder, {VAE.folder: network}, base=self.base, changes={VAE.folder: scale})


def narrowed(network: AutoencoderKL) -> AutoencoderKL:
    """The network, changed in place, with the same small variance for every latent, near FLUX.1's.

    Training learns wide ones, which make the latents smooth; those who encode a picture draw from them.
    """
    last, latents = network.encoder.conv_out, network.config.latent_channels
    kernel, bias = (np.array(value[...]) for value in (last.kernel, last.bias))
    kernel[..., latents:], bias[latents:] = 0, 2 * math.log(LATENT_STD)
    last.kernel.set_value(jnp.asarray(kernel))
    last.bias.set_value(jnp.asarray(bias))
    return network


class ShapesAutoencoder(NumberedTask[ShapesAutoencoderRunConfig]):
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model is not usable.
    """

    title, samples = "an autoencoder", "scenes"

    def __init__(self, config: ShapesAutoencoderRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        base = require_pipeline(resolve(config.model))
        sizes = read_sizes(base)
        network = VAE.abstract(sizes)
        StoredNetwork.open(base / VAE.folder).load(
            network, VAE, sizes, dtype=jnp.float32, sharding_for=sharding_for(mesh)
        )
        self._graph, self.trainable = nnx.split(network)
        self.flops = 3 * convolution_flops(sizes)
        data, train = config.data, config.train
        scenes = make_table(data.scenes, train.seed, spoiled=data.spoiled, workers=data.workers)
        self._fingerprint = scenes.fingerprint
        self._table = jax.device_put(scenes, replicated(mesh))
        batch = train.batch_size // train.gradient_accumulation_steps
        self._measure = Measurement(self._graph, jnp.dtype(train.dtype), batch, mesh)
        measured = SceneTable(*(part[:MEASURED] for part in scenes))
        self.exporter = TrainedAutoencoder(self._graph, base, self._measure, measured)

    def make_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> TrainStep:
        """Draws the scenes of a batch, then updates all parameters."""
        train, table = self._config.train, self._table
        graph, dtype, kl_weight = self._graph, jnp.dtype(train.dtype), self._config.autoencoder.kl_weight

        def objective(trainable: nnx.State, table: SceneTable, numbers: UInt32[Array, " b"]) -> tuple[Array, Metrics]:
            network = nnx.merge(graph, trainable)
            return loss_of(network, table, sample_keys(train.seed, numbers), kl_weight=kl_weight, dtype=dtype)

        parts = train.gradient_accumulation_steps
        update = make_update(objective, optimizer, gradient_accumulation_steps=parts, mesh=self._mesh)
        step = compile_step(update, shardings, self._mesh)

        def take(state: TrainState, inputs: Array) -> tuple[TrainState, StepMetrics]:
            return step(state, table, inputs)

        return take

    def open_validation(self, out: Path) -> AutoencoderValidation | None:
        """Scenes that are not trained on."""
        config = self._config
        if not config.validation.scenes:
            return None
        return AutoencoderValidation(config.validation, config.data.spoiled, self._measure)


def loss_of(
    network: AutoencoderKL, table: SceneTable, keys: Array, *, kl_weight: float, dtype: Dtype
) -> tuple[Float[Array, ""], Metrics]:
    """The squared error of pictures decoded from drawn latents, plus ``kl_weight`` times the divergence.

    Args:
        keys: of the samples, [b]; they choose the scene and the noise.
    """
    count, config = len(table.items), network.config
    side = SIZE // config.factor
    indices = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, SCENE), (), 0, count))(keys)
    shape = (side, side, config.latent_channels)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), shape))(keys)
    found = autoencode(network, table.draw(indices), noise, dtype)
    kl = 0.5 * jnp.mean(jnp.square(found.mean) + jnp.exp(found.logvar) - 1 - found.logvar, axis=(1, 2, 3))
    samples = jnp.asarray(len(keys), jnp.float32)
    metrics = {"psnr": MeanMetric(jnp.sum(decibels(found.error, jnp)), samples), "kl": MeanMetric(jnp.sum(kl), samples)}
    return jnp.mean(found.error + kl_weight * kl), metrics


def read_sizes(base: Path) -> AutoencoderConfig:
    """The sizes of a model's autoencoder; raises InputError if it does not take pictures of the shapes world."""
    sizes = VAE.read_config(base)
    if (sizes.in_channels, sizes.out_channels) != (3, 3) or SIZE % sizes.factor or sizes.use_quant_conv:
        needed = f"an autoencoder of RGB without quant_conv, whose latents divide {SIZE} pixels, is needed"
        raise InputError(f"{base / VAE.folder}: {needed}")
    return sizes


def convolution_flops(sizes: AutoencoderConfig) -> float:
    """Floating-point operations of one picture, there and back: its convolutions."""
    network, picture = VAE.abstract(sizes), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    graph, state = nnx.split(network)

    def both(state: nnx.State, picture: Array) -> Array:
        network = nnx.merge(graph, state)
        return network.decode(network.encode(picture)[0])

    program = jax.make_jaxpr(both)(state, picture)
    convolutions = [one for one in program.eqns if one.primitive.name == "conv_general_dilated"]
    shapes = [(one.outvars[0].aval.shape, one.invars[1].aval.shape) for one in convolutions]
    return float(sum(2 * math.prod(out) * math.prod(kernel[:-1]) for out, kernel in shapes))
