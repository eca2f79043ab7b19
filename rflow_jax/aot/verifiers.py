"""The programs of a search's verifiers and writers that run in its process."""

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
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from rflow_jax.aot.estimate import nvila_projector_flops, picture_flops, qwen2_flops, qwen_vision_flops
from rflow_jax.aot.models import (
    QWEN_7B,
    folder_of,
    in_8_bits,
    read_defaults,
    read_nvila_sizes,
    read_qwen_sizes,
    read_sizes,
)
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device, on_mesh, shaped, whole_in
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.nvila import abstract_nvila
from rflow_jax.models.partitioning import TENSOR
from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import LANGUAGE_LINEARS, abstract_qwen2_5_vl, abstract_reward_model
from rflow_jax.parallel.sharding import on_mesh_of, pick
from rflow_jax.search.config import SearchConfig
from rflow_jax.utils.checks import require_dtype
from rflow_jax.verifiers.config import (
    ChecklistVerifierConfig,
    NvilaVerifierConfig,
    RewardVerifierConfig,
    members_of,
)
from rflow_jax.verifiers.reward import PROMPT
from rflow_jax.vlm import nvila_programs
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.nvila_programs import PICTURES_AT_ONCE, padded_length, token_slots
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_chat import decoding_of
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, fitted, limited, patches_of
from rflow_jax.vlm.qwen_programs import Scoring, first_tokens, rewards, texts
from rflow_jax.weights import components
from rflow_jax.weights.qwen import end_tokens, repetition_penalty
from rflow_jax.weights.reward_config import CONFIG_FILE, RewardConfig
from rflow_jax.writers import REFINE_PROMPT, REFLECTION_PROMPT
from rflow_jax.writers.base import QwenTextGeneratorConfig
from rflow_jax.writers.prompt_template import PromptFile, read_prompt

# No tokenizer is read: an English token has about four letters, and a user's prompt about 64 tokens.
_LETTERS, _PROMPT_TOKENS = 4, 64
_CHAT_TOKENS = 32  # of a chat template: its roles, and the system's message
# Of the published Qwen2.5-VL, used if there is no folder: end tokens, padding, repetition penalty, vocabulary.
_ENDS, _PAD, _PENALTY, _VOCABULARY = (151_643, 151_645), 151_643, 1.05, 151_665
_SPECIAL = 151_665  # the token that a reward model may score


@dataclass(frozen=True)
class LocalModel:
    """A model in a search's process.

    Attributes:
        devices: that hold its weights.
        weights: shapes of its parameters, with shardings.
        programs: without the resident bytes of other models.
    """

    devices: tuple[Any, ...]
    weights: Any
    programs: tuple[AheadProgram, ...]

    def beside(self, others: Sequence[LocalModel]) -> Iterator[AheadProgram]:
        """The programs, with the weights of other models on the same devices counted as resident."""
        shared = {
            device: sum(bytes_on_a_device(other.weights) for other in others if device in other.devices)
            for device in self.devices
        }
        for program in self.programs:
            yield replace(program, resident_bytes=program.resident_bytes + max(shared.values()))


def verifier_programs(config: SearchConfig, devices: Sequence[Any], *, layers: int | None = None) -> list[AheadProgram]:
    """The programs of a search's verifiers and writers; empty if all are remote or CLIP.

    The search's own pipeline is not counted as resident.

    Args:
        devices: of the process, which ``devices`` of a model indexes; a model without that takes the first.
        layers: of each transformer, for a quick check.

    Raises:
        InputError: a model of unknown sizes, or a setting that is not usable.
    """
    models = local_models(config, devices, layers=layers)
    return [
        program
        for index, model in enumerate(models)
        for program in model.beside([*models[:index], *models[index + 1 :]])
    ]


def local_models(config: SearchConfig, devices: Sequence[Any], *, layers: int | None = None) -> list[LocalModel]:
    """The models behind :func:`verifier_programs`; writers that are configured alike share one."""
    members = members_of(config.verifier)
    image = _image_size(config)
    judges: list[LocalModel] = []
    for k, member in enumerate(members, 1):
        role = "verifier" if members == (config.verifier,) else f"verifier {k}"
        if isinstance(member, NvilaVerifierConfig):
            judges.append(_nvila(role, member, image, devices, layers))
        elif isinstance(member, RewardVerifierConfig):
            judges.append(_reward(role, member, image, devices, layers))
        elif isinstance(member, ChecklistVerifierConfig):
            judges.append(_checklist(role, member, image, devices, layers))
    writers = {"reflector": (config.reflector, REFLECTION_PROMPT, 1 + config.reflect.history)}
    writers["refiner"] = (config.refiner, REFINE_PROMPT, 1)
    asked: dict[QwenChatConfig, dict[QwenInputs, list[str]]] = {}
    for role, (writer, prompt, pictures) in writers.items():
        if isinstance(writer, QwenTextGeneratorConfig):
            options = writer.chat
            sizes, rules = read_qwen_sizes(options.model, layers)
            text = _text_tokens(writer, prompt, pictures)
            inputs = _inputs(sizes, rules, [image] * pictures, text, options.max_pixels, options.batch_size)
            asked.setdefault(options, {}).setdefault(inputs, []).append(role)
    return [*judges, *(_qwen(options, own, devices, layers) for options, own in asked.items())]


def _image_size(config: SearchConfig) -> tuple[int, int]:
    """Width and height; the model is read only where they are its own."""
    sampling = config.sampling
    if sampling.width is not None and sampling.height is not None:
        return sampling.width, sampling.height
    flux = read_sizes(config.model)[0][components.TRANSFORMER.folder]
    resolved = sampling.resolve(read_defaults(config.model, flux))
    return resolved.width, resolved.height


def _nvila(
    role: str, options: NvilaVerifierConfig, image: tuple[int, int], devices: Sequence[Any], layers: int | None
) -> LocalModel:
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
    length = pictures * (each + 1) + _CHAT_TOKENS + _PROMPT_TOKENS * (2 if options.template == "question" else 1)
    length = padded_length(length, sizes.language.max_position_embeddings)
    whole = NamedSharding(mesh, PartitionSpec())
    pixels = _host((PICTURES_AT_ONCE, side, side, sizes.vision.num_channels), np.uint8)
    looked = shaped((slots, each, width), dtype, whole), pixels, _host((256, sizes.vision.num_channels), np.float32), 0
    table = _host((rows, length), np.int32)
    asked = table, table, shaped((slots * each, width), dtype, whole), _host((rows,), np.int32)
    # The tower's blocks after the selected layer do not run.
    depth = sizes.mm_vision_select_layer % (sizes.vision.num_hidden_layers + 1)
    vision = replace(sizes.vision, num_hidden_layers=depth)
    projector = nvila_projector_flops(vision.hidden_size, width, sizes.picture_tokens)
    look = PICTURES_AT_ONCE * (picture_flops(vision, class_token=False) + projector)
    answer = rows * (qwen2_flops(sizes.language, length) + 2 * width * sizes.language.vocab_size)
    programs = _programs(
        f"{role} nvila",
        mesh,
        weights,
        look=(lambda: nvila_programs.look.lower(graph, weights, *looked), look, 1),
        answer=(lambda: nvila_programs.answer.lower(graph, weights, *asked), answer, 1),
    )
    return LocalModel(tuple(mesh.devices.flat), weights, programs)


def _reward(
    role: str, options: RewardVerifierConfig, image: tuple[int, int], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    checkpoint = _reward_config(options)
    sizes, rules = read_qwen_sizes(checkpoint.base, layers)
    model = abstract_reward_model(sizes, checkpoint.outputs, jnp.dtype(require_dtype(options.dtype)))
    if not options.merge_lora:
        attach_shapes(model, dict.fromkeys(select(linears(model), LANGUAGE_LINEARS), checkpoint.rank))
    model = in_8_bits(model, options.quantization, LANGUAGE_LINEARS)
    mesh = _mesh(options.devices, devices)
    graph, weights = _placed(model, mesh)
    prompt = read_prompt(Path(options.prompt_file) if options.prompt_file else PROMPT)
    limit = checkpoint.max_pixels if options.max_pixels is None else options.max_pixels
    text = _tokens_in(prompt) + _CHAT_TOKENS + _PROMPT_TOKENS
    inputs = _inputs(sizes, rules, [image], text, limit, options.batch_size)
    scoring = Scoring(checkpoint.token, _SPECIAL if checkpoint.special_tokens else None, mrope=options.mrope)

    def lower() -> Any:
        return rewards.lower(graph, rules, scoring, weights, inputs)

    programs = _programs(f"{role} reward", mesh, weights, rewards=(lower, _read_flops(sizes, inputs), 1))
    return LocalModel(tuple(mesh.devices.flat), weights, programs)


def _reward_config(options: RewardVerifierConfig) -> RewardConfig:
    """The checkpoint's configuration if it is on this machine, else the original's."""
    folder = folder_of(options.model)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return RewardConfig(options.base or QWEN_7B)
    config = RewardConfig.read(folder)
    beside = folder / config.base
    return replace(config, base=options.base or (str(beside) if beside.is_dir() else config.base))


def _checklist(
    role: str, options: ChecklistVerifierConfig, image: tuple[int, int], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    sizes, rules = read_qwen_sizes(options.model, layers)
    mesh, graph, weights = _placed_qwen(sizes, options, devices)
    text, rows = _CHAT_TOKENS + _PROMPT_TOKENS, options.batch_size
    inputs = _inputs(sizes, rules, [image], text, options.max_pixels, rows)

    def lower() -> Any:
        return first_tokens.lower(graph, rules, weights, inputs, _host((2,), np.int32))

    language = sizes.language
    flops = _read_flops(sizes, inputs) + rows * 2 * language.hidden_size * language.vocab_size
    programs = _programs(f"{role} checklist", mesh, weights, answers=(lower, flops, 1))
    return LocalModel(tuple(mesh.devices.flat), weights, programs)


def _qwen(
    options: QwenChatConfig, asked: Mapping[QwenInputs, Sequence[str]], devices: Sequence[Any], layers: int | None
) -> LocalModel:
    """A model that writes; ``asked``: shapes of its batches -> the roles with such batches."""
    sizes, rules = read_qwen_sizes(options.model, layers)
    mesh, graph, weights = _placed_qwen(sizes, options, devices)
    data = _host((options.batch_size, 2), np.uint32)
    keys = jax.eval_shape(partial(jax.random.wrap_key_data, impl="threefry2x32"), data)
    decoding, new = _decoding(options, sizes), options.max_new_tokens

    def lower(inputs: QwenInputs) -> Any:
        return texts.lower(graph, rules, decoding, weights, inputs, keys)

    programs: list[AheadProgram] = []
    for inputs, roles in asked.items():
        # On average a token attends to half of the new tokens.
        made = new * qwen2_flops(sizes.language, 1, past=inputs.ids.shape[1] + new // 2, logits=1)
        flops = _read_flops(sizes, inputs) + options.batch_size * made
        own = {"texts": (partial(lower, inputs), flops, 1 + new)}
        programs += _programs(f"{' and '.join(roles)} qwen", mesh, weights, **own)
    return LocalModel(tuple(mesh.devices.flat), weights, tuple(programs))


def _placed_qwen(
    sizes: Qwen25VLConfig, options: QwenChatConfig | ChecklistVerifierConfig, devices: Sequence[Any]
) -> tuple[Mesh, nnx.GraphDef, nnx.State]:
    """A model that answers, on its devices."""
    model = abstract_qwen2_5_vl(sizes, jnp.dtype(require_dtype(options.dtype)))
    model = in_8_bits(model, options.quantization, LANGUAGE_LINEARS)
    mesh = _mesh(options.devices, devices)
    return mesh, *_placed(model, mesh)


def _decoding(options: QwenChatConfig, sizes: Qwen25VLConfig) -> Decoding:
    folder = folder_of(options.model)
    ends = () if folder is None else end_tokens(folder, sizes)
    penalty = _PENALTY if folder is None else repetition_penalty(folder)
    last = sizes.language.vocab_size
    return decoding_of(
        options,
        eos=ends or tuple(min(end, last - 1) for end in _ENDS),
        pad=min(_PAD, last - 1),
        repetition_penalty=penalty,
        vocabulary=min(_VOCABULARY, last),
    )


def _text_tokens(writer: QwenTextGeneratorConfig, default: Path, pictures: int) -> int:
    """About the number of text tokens in a writer's chat."""
    parts = PromptFile.of(writer.prompt_file, default)
    written = parts.instructions + parts.question.text.template + (pictures - 1) * parts.past.text.template
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
        text: number of text tokens of a chat.
    """
    black = (Image.new("RGB", size) for size in images)
    if max_pixels is not None:
        black = (limited(image, max_pixels, rules.factor) for image in black)
    pictures = tuple(patches_of(fitted(image, rules), rules) for image in black)
    ids = [np.zeros(max(1, text - 2 * len(pictures)), np.int32)]
    for _, grid in pictures:
        units = grid[1] * grid[2] // config.vision.unit
        ids += [np.full(units, config.image_token_id, np.int32), np.zeros(2, np.int32)]
    samples = [QwenSample(np.concatenate(ids), pictures)] * rows
    batch = batch_of(samples, config, pad=0, sizes=Sizes.bucketed(samples, config, rows))
    return jax.tree.map(lambda x: _host(x.shape, x.dtype), batch)


def _read_flops(config: Qwen25VLConfig, inputs: QwenInputs) -> float:
    """Operations up to the last hidden state and one token's logits of every row, padding included."""
    (rows, tokens), pictures = inputs.ids.shape, (0, 0, 0) if inputs.patches is None else inputs.patches.shape
    seen = pictures[0] * qwen_vision_flops(config.vision, pictures[1]) if pictures[0] else 0.0
    return seen + rows * qwen2_flops(config.language, tokens)


def _mesh(numbers: Sequence[int] | None, devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(pick((0,) if numbers is None else numbers, devices)), (TENSOR,))


def _placed(model: nnx.Module, mesh: Mesh) -> tuple[Any, Any]:
    graph, state = nnx.split(model)
    return graph, on_mesh(state, mesh)


def _programs(
    prefix: str, mesh: Mesh, weights: Any, **given: tuple[Callable[[], Any], float, int]
) -> tuple[AheadProgram, ...]:
    """One program for each name; given: its lowering, its operations, and the number of passes over all weights."""

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


def _host(shape: Sequence[int], dtype: Dtype) -> jax.ShapeDtypeStruct:
    """The shape of an array that comes from the host, without a sharding."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
