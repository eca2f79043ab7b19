"""The programs of the verifiers and writers of a search that run in its process, of a real configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from rflow_jax.aot.estimate import nvila_projector_flops, picture_flops, qwen2_flops, qwen_vision_flops
from rflow_jax.aot.models import QWEN_7B, folder_of, in_8_bits, read_nvila_sizes, read_qwen_sizes
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device, on_mesh, shaped, whole_in
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.nvila import NvilaConfig, abstract_nvila
from rflow_jax.models.partitioning import TENSOR
from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.models.qwen2_5_vl.model import LANGUAGE_LINEARS, abstract_qwen2_5_vl, abstract_reward_model
from rflow_jax.parallel.sharding import on_mesh_of, pick
from rflow_jax.search.config import SearchConfig
from rflow_jax.utils.checks import require_dtype
from rflow_jax.verifiers.config import REWARD, VerifierConfig
from rflow_jax.verifiers.factory import configure
from rflow_jax.verifiers.nvila import NvilaVerifierConfig
from rflow_jax.verifiers.reward import PROMPT, RewardVerifierConfig
from rflow_jax.vlm import nvila_programs
from rflow_jax.vlm.nvila_programs import PICTURES_AT_ONCE, padded_length, token_slots
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_chat import QwenChatConfig
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, fitted, limited, patches_of
from rflow_jax.vlm.qwen_programs import Scoring, rewards, texts
from rflow_jax.weights.qwen import end_tokens, repetition_penalty
from rflow_jax.weights.reward import CONFIG_FILE, RewardConfig
from rflow_jax.writers import REFINE_PROMPT, REFLECTION_PROMPT
from rflow_jax.writers.base import TextGeneratorConfig
from rflow_jax.writers.prompt_template import PromptFile, read_prompt

# No tokenizer is read: a token of English is about four letters, and a prompt in hand so many tokens.
_LETTERS, _PROMPT_TOKENS = 4, 64
_CHAT_TOKENS = 32  # of a chat's form: its roles, and the system's message
# Of the published Qwen2.5-VL, where no folder says: text ends, the penalty of repetition, tokens that there are.
_ENDS, _PAD, _PENALTY, _VOCABULARY = (151_643, 151_645), 151_643, 1.05, 151_665
_SPECIAL = 151_665  # the token that a reward model may score


@dataclass(frozen=True)
class LocalModel:
    """A model in a search's process.

    Attributes:
        devices: those that it lies on.
        weights: shapes of its parameters, with shardings.
        programs: what is compiled, without what is resident of other models.
    """

    devices: tuple[Any, ...]
    weights: Any
    programs: tuple[AheadProgram, ...]

    def beside(self, others: Sequence[LocalModel]) -> Iterator[AheadProgram]:
        """The programs, with the weights of other models that the same devices hold."""
        shared = {
            device: sum(bytes_on_a_device(other.weights) for other in others if device in other.devices)
            for device in self.devices
        }
        for program in self.programs:
            yield replace(program, resident_bytes=program.resident_bytes + max(shared.values()))


def verifier_programs(config: SearchConfig, devices: Sequence[Any], *, layers: int | None = None) -> list[AheadProgram]:
    """What the verifiers and writers of a search compile for its images; empty where all are asked over HTTP or CLIP.

    The search's own pipeline is not counted among what is resident.

    Args:
        devices: of the process, among which ``options.devices`` counts; a model without that takes the first.
        layers: so many of each transformer, for a quick check.

    Raises:
        InputError: a model whose sizes are not known, or a setting that is not usable.
    """
    models = local_models(config, devices, layers=layers)
    return [
        program
        for place, model in enumerate(models)
        for program in model.beside([*models[:place], *models[place + 1 :]])
    ]


def local_models(config: SearchConfig, devices: Sequence[Any], *, layers: int | None = None) -> list[LocalModel]:
    """The models behind :func:`verifier_programs`; writers that are configured alike share one."""
    verifiers = {f"verifier {k}": member for k, member in enumerate(config.verifier.members, 1)}
    image = config.settings.width, config.settings.height
    made = [
        _MAKERS[one.name](role, one, image, devices, layers)
        for role, one in (verifiers or {"verifier": config.verifier}).items()
        if one.name in _MAKERS
    ]
    writers = {"reflector": (config.reflector, REFLECTION_PROMPT, 1 + config.reflect.history)}
    writers["refiner"] = (config.refiner, REFINE_PROMPT, 1)
    asked: dict[QwenChatConfig, dict[QwenInputs, list[str]]] = {}
    for role, (writer, prompt, pictures) in writers.items():
        if writer.name == "qwen":
            options = configure(QwenChatConfig, writer.model, writer.options, role)
            inputs = _chats(options, _told(writer, prompt, pictures), [image] * pictures, layers)
            asked.setdefault(options, {}).setdefault(inputs, []).append(role)
    return [*made, *(_qwen(options, own, devices, layers) for options, own in asked.items())]


def _nvila(
    role: str, config: VerifierConfig, image: tuple[int, int], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    options = configure(NvilaVerifierConfig, config.model, config.options, role)
    sizes, dtype = read_nvila_sizes(options.model, layers), jnp.dtype(options.dtype)
    network = abstract_nvila(sizes, dtype)
    network.language = in_8_bits(network.language, options.quantization)
    mesh = _mesh(options.devices, devices)
    graph, weights = _placed(network, mesh)
    rows, side = options.batch_size, sizes.vision.image_size
    slots, each, width = token_slots(sizes, rows)
    columns, lines = sizes.tiling.grid(*image)
    pictures = columns * lines + (columns * lines > 1)
    # A picture ends in a newline.
    length = pictures * (each + 1) + _CHAT_TOKENS + _PROMPT_TOKENS
    if options.template == "question":
        length += _PROMPT_TOKENS
    length = padded_length(length, sizes.language.max_position_embeddings)
    whole = NamedSharding(mesh, PartitionSpec())
    seen = _host((PICTURES_AT_ONCE, side, side, sizes.vision.num_channels), np.uint8)
    looked = shaped((slots, each, width), dtype, whole), seen, _host((256, sizes.vision.num_channels), np.float32), 0
    table = _host((rows, length), np.int32)
    asked = table, table, shaped((slots * each, width), dtype, whole), _host((rows,), np.int32)
    # The tower's blocks beyond the layer that is looked at are left out.
    depth = sizes.mm_vision_select_layer % (sizes.vision.num_hidden_layers + 1)
    answer = rows * (qwen2_flops(sizes.language, length) + 2 * width * sizes.language.vocab_size)
    programs = _programs(
        f"{role} nvila",
        mesh,
        weights,
        look=(lambda: nvila_programs.look.lower(graph, weights, *looked), _look_flops(sizes, depth), 1),
        answer=(lambda: nvila_programs.answer.lower(graph, weights, *asked), answer, 1),
    )
    return LocalModel(tuple(mesh.devices.flat), weights, programs)


def _look_flops(sizes: NvilaConfig, depth: int) -> float:
    """Operations of a group of pictures."""
    vision = replace(sizes.vision, num_hidden_layers=depth)
    tokens, width = sizes.picture_tokens, sizes.language.hidden_size
    one = picture_flops(vision, class_token=False) + nvila_projector_flops(vision.hidden_size, width, tokens)
    return PICTURES_AT_ONCE * one


def _reward(
    role: str, config: VerifierConfig, image: tuple[int, int], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    options = configure(RewardVerifierConfig, config.model, config.options, role)
    how = _reward_config(options)
    sizes, rules = read_qwen_sizes(how.base, layers)
    model = abstract_reward_model(sizes, how.outputs, jnp.dtype(require_dtype(options.dtype)))
    if not options.merge_lora:
        chosen = select(linears(model), LANGUAGE_LINEARS)
        attach_shapes(model, dict.fromkeys(chosen, how.rank))
    model = in_8_bits(model, options.quantization, LANGUAGE_LINEARS)
    mesh = _mesh(options.devices, devices)
    graph, weights = _placed(model, mesh)
    prompt = read_prompt(Path(options.prompt_file) if options.prompt_file else PROMPT)
    limit = how.max_pixels if options.max_pixels is None else options.max_pixels
    text = _tokens_in(prompt) + _CHAT_TOKENS + _PROMPT_TOKENS
    inputs = _inputs(sizes, rules, [image], text, limit, options.batch_size)
    scoring = Scoring(how.token, _SPECIAL if how.special_tokens else None, mrope=options.mrope)

    def lower() -> Any:
        return rewards.lower(graph, rules, scoring, weights, inputs)

    programs = _programs(f"{role} {REWARD}", mesh, weights, rewards=(lower, _read_flops(sizes, inputs), 1))
    return LocalModel(tuple(mesh.devices.flat), weights, programs)


def _reward_config(options: RewardVerifierConfig) -> RewardConfig:
    """What the checkpoint says where it is on this machine, else the original's values."""
    folder = folder_of(options.model)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return RewardConfig(options.base or QWEN_7B)
    said = RewardConfig.read(folder)
    beside = folder / said.base
    return replace(said, base=options.base or (str(beside) if beside.is_dir() else said.base))


def _chats(options: QwenChatConfig, text: int, images: Sequence[tuple[int, int]], layers: int | None) -> QwenInputs:
    sizes, rules = read_qwen_sizes(options.model, layers)
    return _inputs(sizes, rules, images, text, options.max_pixels, options.batch_size)


def _qwen(
    options: QwenChatConfig, asked: Mapping[QwenInputs, Sequence[str]], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    """A model that writes.

    Args:
        asked: shapes of its batches -> the roles that have such.
    """
    sizes, rules = read_qwen_sizes(options.model, layers)
    model = abstract_qwen2_5_vl(sizes, jnp.dtype(require_dtype(options.dtype)))
    model = in_8_bits(model, options.quantization, LANGUAGE_LINEARS)
    mesh = _mesh(options.devices, devices)
    graph, weights = _placed(model, mesh)
    data = _host((options.batch_size, 2), np.uint32)
    keys = jax.eval_shape(partial(jax.random.wrap_key_data, impl="threefry2x32"), data)
    decoding, new = _decoding(options, sizes), options.max_new_tokens

    def lower(inputs: QwenInputs) -> Any:
        return texts.lower(graph, rules, decoding, weights, inputs, keys)

    programs: list[AheadProgram] = []
    for inputs, roles in asked.items():
        # A token sees half of those that are made, in the mean.
        made = new * qwen2_flops(sizes.language, 1, past=inputs.ids.shape[1] + new // 2, logits=1)
        flops = _read_flops(sizes, inputs) + options.batch_size * made
        own = {"texts": (partial(lower, inputs), flops, 1 + new)}
        programs += _programs(f"{' and '.join(roles)} qwen", mesh, weights, **own)
    return LocalModel(tuple(mesh.devices.flat), weights, tuple(programs))


def _decoding(options: QwenChatConfig, sizes: Qwen25VLConfig) -> Decoding:
    folder = folder_of(options.model)
    ends = () if folder is None else end_tokens(folder, sizes)
    penalty = _PENALTY if folder is None else repetition_penalty(folder)
    last = sizes.language.vocab_size
    return options.decoding(
        eos=ends or tuple(min(end, last - 1) for end in _ENDS),
        pad=min(_PAD, last - 1),
        repetition_penalty=penalty,
        vocabulary=min(_VOCABULARY, last),
    )


def _told(writer: TextGeneratorConfig, default: Path, pictures: int) -> int:
    """About how many tokens of text a writer is told about so many pictures."""
    parts = PromptFile.of(writer.prompt_file, default)
    written = parts.instructions + parts.question.template + (pictures - 1) * parts.past.template
    return _tokens_in(written) + _CHAT_TOKENS + (1 + pictures) * _PROMPT_TOKENS


def _tokens_in(text: str) -> int:
    return -(-len(text) // _LETTERS)


def _inputs(
    config: Qwen25VLConfig,
    rules: ImageProcessorConfig,
    images: Sequence[tuple[int, int]],
    text: int,
    max_pixels: int | None,
    rows: int,
) -> QwenInputs:
    """The shapes of a batch, padded as a real one.

    Args:
        images: width and height of the pictures of a chat.
        text: tokens of a chat beside those of its pictures.
    """
    pictures = tuple(_picture(size, rules, max_pixels) for size in images)
    ids = [np.zeros(max(1, text - 2 * len(pictures)), np.int32)]
    for _, grid in pictures:
        units = grid[1] * grid[2] // config.vision.unit
        ids += [np.full(units, config.image_token_id, np.int32), np.zeros(2, np.int32)]
    samples = [QwenSample(np.concatenate(ids), pictures)] * rows
    batch = batch_of(samples, config, pad=0, sizes=Sizes.bucketed(samples, config, rows))
    return jax.tree.map(lambda x: _host(x.shape, x.dtype), batch)


def _picture(size: tuple[int, int], rules: ImageProcessorConfig, max_pixels: int | None) -> tuple[np.ndarray, Grid]:
    """Patches and grid of a black picture."""
    image = Image.new("RGB", size)
    return patches_of(fitted(image if max_pixels is None else limited(image, max_pixels, rules.factor), rules), rules)


def _read_flops(config: Qwen25VLConfig, inputs: QwenInputs) -> float:
    """Operations up to the last hidden state and one token's logits of every row, padding included."""
    (rows, tokens), pictures = inputs.ids.shape, (0, 0, 0) if inputs.patches is None else inputs.patches.shape
    seen = pictures[0] * qwen_vision_flops(config.vision, pictures[1]) if pictures[0] else 0.0
    return seen + rows * qwen2_flops(config.language, tokens)


def _mesh(numbers: Sequence[int] | None, devices: Sequence[Any]) -> Mesh:
    """The devices that a model takes."""
    return Mesh(np.array(pick((0,) if numbers is None else numbers, devices)), (TENSOR,))


def _placed(model: nnx.Module, mesh: Mesh) -> tuple[Any, Any]:
    graph, state = nnx.split(model)
    return graph, on_mesh(state, mesh)


def _programs(
    prefix: str, mesh: Mesh, weights: Any, **given: tuple[Callable[[], Any], float, int]
) -> tuple[AheadProgram, ...]:
    """One program for each name: how it is lowered, its operations, and how often it reads all weights."""

    def lowering(lower: Callable[[], Any]) -> Callable[[], Any]:
        def lowered() -> Any:
            with on_mesh_of(weights):
                return lower()

        return lowered

    once, whole = bytes_on_a_device(weights), whole_in(weights)
    return tuple(
        AheadProgram(f"{prefix} {name}", lowering(lower), mesh.size, 0, flops, float(passes * once), whole)
        for name, (lower, flops, passes) in given.items()
    )


def _host(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The stand-in for an array that comes from the host, and lies where the compiler wants it."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


_MAKERS: dict[str, Callable[..., LocalModel]] = {"nvila": _nvila, REWARD: _reward}
