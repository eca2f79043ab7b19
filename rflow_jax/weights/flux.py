"""Finds and loads FLUX models: converted by us, in diffusers' layout, or Black Forest Labs' single files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.flow import PATCH, Schedule
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxGraph, abstract_flux
from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.lora import attach, check_fit, linear_shapes
from rflow_jax.models.text_encoders import ClipTextConfig
from rflow_jax.parallel.sharding import put_by, sharding_for
from rflow_jax.tokenizers.flux import CLIP_TOKENIZER, T5_TOKENIZER, Tokenizers
from rflow_jax.utils.checks import require_dtype
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.json_files import read_object
from rflow_jax.utils.progress import byte_progress
from rflow_jax.weights import components
from rflow_jax.weights.components import COMPONENTS, TRANSFORMER, Component, read_schedule
from rflow_jax.weights.defaults import SamplingDefaults
from rflow_jax.weights.gguf_io import GgufFiles, open_file
from rflow_jax.weights.hub import resolve, resolve_lora
from rflow_jax.weights.key_mapping import KeyMapping
from rflow_jax.weights.loading import ShardingFor, load_into
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.mappings.flux import is_bfl
from rflow_jax.weights.model_folder import FORMAT, MODEL_FILE, VERSION, is_stored, load_stored, stored_bytes
from rflow_jax.weights.pytorch_files import is_pickle
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import PARTIAL

Kind = Literal["converted", "diffusers", "bfl"]
EXPECTED = (
    f"expected a converted folder ({MODEL_FILE}), a folder in diffusers' layout (model_index.json) "
    "or a single file of Black Forest Labs' layout (flux1-dev.safetensors, flux1-dev-Q8_0.gguf)"
)
INDEX_FILE = "model_index.json"  # of diffusers; a converted folder keeps it
TRANSFORMER_CLASS = "FluxTransformer2DModel"


@dataclass(frozen=True)
class ModelPath:
    """A model that was found.

    Attributes:
        components: subfolder's name -> the path of that network (a folder, or a single file).
        info: content of ``rflow_model.json`` or ``model_index.json``.
    """

    kind: Kind
    path: Path
    components: dict[str, Path]
    info: dict[str, Any] = field(default_factory=dict)


def describe(path: Path) -> ModelPath:
    """Says what kind of model lies at ``path``.

    Raises:
        InputError: nothing there, not a model, an interrupted conversion, or one of a newer version.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {EXPECTED}")
    if path.name.endswith(PARTIAL):
        raise InputError(f"{path}: a conversion that was interrupted; convert again")
    if path.is_file():
        # A pickle's content is not looked at before it is known to be wanted.
        if not is_pickle(path) and not is_bfl(files := open_file(path)):
            kind = files.architecture if isinstance(files, GgufFiles) else ""
            raise InputError(f"{path}: {f'a GGUF of {kind},' if kind else 'is'} not a FLUX transformer: {EXPECTED}")
        return ModelPath("bfl", path, {TRANSFORMER.folder: path})
    if (path / MODEL_FILE).is_file():
        info = read_object(path / MODEL_FILE)
        if info.get("format") != FORMAT:
            raise InputError(f"{path / MODEL_FILE}: not written by rflow convert")
        if (version := info.get("version")) != VERSION:
            raise InputError(f"{path}: format version {version}, this program reads {VERSION}; convert again")
        return ModelPath("converted", path, {name: path / name for name in info.get("components", ())}, info)
    if (path / INDEX_FILE).is_file():
        info = read_object(path / INDEX_FILE)
        found = {c.folder: path / c.folder for c in COMPONENTS if (path / c.folder / "config.json").is_file()}
        if TRANSFORMER.folder not in found:
            raise InputError(f"{path}: has a model_index.json but no transformer/config.json; fetch the whole folder")
        return ModelPath("diffusers", path, found, info)
    config = path / "config.json"
    if config.is_file() and read_object(config).get("_class_name") == TRANSFORMER_CLASS:
        return ModelPath("diffusers", path, {TRANSFORMER.folder: path})
    single = sorted((*path.glob("flux1-*.safetensors"), *path.glob("flux1-*.gguf")))
    if len(single) == 1:
        ae = {"vae": path / "ae.safetensors"} if (path / "ae.safetensors").is_file() else {}
        return ModelPath("bfl", path, {TRANSFORMER.folder: single[0]} | ae)
    raise InputError(f"{path}: is not a model: {EXPECTED}")


Weights = dict[str, Any]  # ``transformer`` -> (base, LoRA), the LoRA's state empty if there is none; vae, clip, t5


class GraphDefs(NamedTuple):
    """The networks without their weights."""

    transformer: FluxGraph
    vae: nnx.GraphDef
    clip: nnx.GraphDef
    t5: nnx.GraphDef


@dataclasses.dataclass(frozen=True)
class FluxModel:
    """A loaded model.

    Attributes:
        name: what it was loaded from.
        dtype: of the activations.
        defaults: how it generates unless a setting says otherwise.
    """

    name: str
    graphs: GraphDefs
    weights: Weights
    tokenizers: Tokenizers
    schedule: Schedule
    flux_config: FluxConfig
    vae_config: AutoencoderConfig
    clip_config: ClipTextConfig
    dtype: Dtype
    defaults: SamplingDefaults = SamplingDefaults()
    has_lora: bool = False

    @property
    def token_pixels(self) -> int:
        """Pixels a side of one image token."""
        return self.vae_config.factor * PATCH

    @property
    def lora_paths(self) -> list[str]:
        """Dotted paths of the linears that carry an adapter."""
        if not self.has_lora:
            return []
        states = (nnx.to_flat_state(state) for state in self.weights["transformer"])
        return [".".join(map(str, path[:-1])) for state in states for path, _ in state if path[-1] == "lora_a"]

    @property
    def clip_length(self) -> int:
        return self.clip_config.max_position_embeddings

    def without_lora(self) -> FluxModel:
        """The same model without its adapters; shares the weights."""
        scan_blocks = self.graphs.transformer.scan_blocks
        graph = FluxGraph.of(abstract_flux(self.flux_config, self.dtype), scan_blocks=scan_blocks)
        weights = self.weights | {"transformer": (self.weights["transformer"][0], nnx.State({}))}
        return dataclasses.replace(
            self, graphs=self.graphs._replace(transformer=graph), weights=weights, has_lora=False
        )


def load_flux(
    model: str,
    *,
    lora: str | None,
    lora_alpha: float | None,
    dtype: str,
    mesh: jax.sharding.Mesh | None = None,
    scan_blocks: bool | None = False,
    progress: bool = True,
) -> FluxModel:
    """Reads a model folder; see :func:`rflow_jax.generation.pipeline.load_pipeline` for the arguments and errors."""
    kind: Any = getattr(jnp, require_dtype(dtype))
    root = resolve(model)
    found = describe(root)
    paths = _component_paths(model, found)
    adapters = None if lora is None else read_lora(resolve_lora(lora), alpha=lora_alpha)
    configs = {component.folder: component.read_config(root) for component in COMPONENTS}
    schedule, defaults = read_schedule(root), defaults_of(found, configs[TRANSFORMER.folder])
    choose = None if mesh is None else sharding_for(mesh)
    with ThreadPoolExecutor(1) as aside:  # importing Transformers takes seconds; weights are read meanwhile
        tokenizers = aside.submit(Tokenizers, root)
        networks = {component.folder: component.abstract(configs[component.folder], kind) for component in COMPONENTS}
        transformer: Any = networks[components.TRANSFORMER.folder]
        if adapters is not None:  # before gigabytes are read
            check_fit(adapters.adapters, linear_shapes(transformer), adapters.source)
        _load_networks(networks, paths, configs, kind, choose, progress)
    if adapters is not None:
        put = None if choose is None else put_by(choose)
        attach(transformer, adapters.adapters, dtype=kind, put=put, source=adapters.source)
    graph = FluxGraph.of(transformer, scan_blocks=scans_blocks(scan_blocks, mesh))
    _, matrices, scales, base = nnx.split(transformer, nnx.LoRAParam, LoRAScale, ...)
    parts = {c.folder: nnx.split(networks[c.folder]) for c in (components.VAE, components.CLIP, components.T5)}
    (vae_graph, vae), (clip_graph, clip), (t5_graph, t5) = parts.values()
    return FluxModel(
        name=model,
        graphs=GraphDefs(graph, vae_graph, clip_graph, t5_graph),
        weights={
            "transformer": (graph.stack_loaded(base), nnx.merge_state(matrices, scales)),
            "vae": vae,
            "clip": clip,
            "t5": t5,
        },
        tokenizers=tokenizers.result(),
        schedule=schedule,
        flux_config=configs[components.TRANSFORMER.folder],
        vae_config=configs[components.VAE.folder],
        clip_config=configs[components.CLIP.folder],
        dtype=kind,
        defaults=defaults,
        has_lora=lora is not None,
    )


def defaults_of(found: ModelPath, config: FluxConfig) -> SamplingDefaults:
    """How a model generates unless told otherwise; raises InputError if what its folder says is not usable."""
    index = found.path / INDEX_FILE
    info = read_object(index) if index.is_file() else {}
    return SamplingDefaults.of_model(info, guidance_embeds=config.guidance_embeds, source=index)


def scans_blocks(wanted: bool | None, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether blocks are stacked; None: only on TPU, where an unrolled network takes too long to compile."""
    if wanted is not None:
        return wanted
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "tpu"


def _component_paths(model: str, found: ModelPath) -> dict[str, Path]:
    """The path of each network; raises InputError unless all four are there."""
    if found.kind == "bfl":
        raise InputError(f"{model}: a single file; first convert it with rflow convert flux")
    missing = [component.folder for component in COMPONENTS if component.folder not in found.components]
    if missing:
        raise InputError(f"{model}: has no {', '.join(missing)}; generating needs all four networks of a FLUX model")
    if missing := [name for name in (CLIP_TOKENIZER, T5_TOKENIZER) if not (found.path / name).is_dir()]:
        raise InputError(f"{model}: has no {', '.join(missing)}; fetch the whole folder")
    for path in (found.path / CLIP_TOKENIZER, found.path / T5_TOKENIZER, *found.components.values()):
        require_true_files(path)
    return found.components


def _load_networks(
    networks: dict[str, Any],
    paths: dict[str, Path],
    configs: dict[str, Any],
    dtype: Dtype,
    choose: ShardingFor | None,
    progress: bool,
) -> None:
    """Fills every network with its weights; one bar, in bytes, over all of them."""
    sources = {folder: StoredNetwork.open(path) for folder, path in paths.items()}
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(source.nbytes for source in sources.values()))
        for component in COMPONENTS:
            name = component.folder
            bar.update(task, description=f"loading {name}")
            options = {"dtype": dtype, "sharding_for": choose, "on_bytes": lambda done: bar.advance(task, done)}
            sources[name].load(networks[name], component, configs[name], **options)


@dataclasses.dataclass(frozen=True)
class StoredNetwork:
    """The stored weights of one network, in its own layout or in ours."""

    path: Path
    nbytes: int
    files: TensorFiles | None  # None: in our layout

    @classmethod
    def open(cls, path: Path) -> StoredNetwork:
        """Reads the headers only."""
        if is_stored(path):
            return cls(path, stored_bytes(path), None)
        files = TensorFiles.open(path)
        return cls(path, files.nbytes, files)

    def load(self, network: nnx.Module, component: Component, config: Any, **options: Any) -> None:
        """Puts the weights of an abstract network on the devices; ``options`` as in :func:`load_into`."""
        self.load_with(network, lambda files: component.table_for(files, config), **options)

    def load_with(self, network: nnx.Module, table_for: Callable[[TensorFiles], KeyMapping], **options: Any) -> None:
        """As :meth:`load`, with the table of a checkpoint's names for its files."""
        if self.files is None:
            load_stored(network, self.path, **options)
        else:
            load_into(network, table_for(self.files), self.files, **options)
