"""A small untrained Qwen2.5-VL for the world of colored shapes, and a tokenizer of its questions and orders."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig, VisionConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.shapes.edits import Edit
from rflow_jax.shapes.grammar import COLORS, MAX_COUNT, NUMBERS, SHAPES, Prompt, Wanted, plural, with_article
from rflow_jax.shapes.initial import draw_parameters
from rflow_jax.shapes.requirements import CONTENT, requirements
from rflow_jax.shapes.scenes import SIZE, THING
from rflow_jax.shapes.vocabulary import byte_pairs
from rflow_jax.verifiers.findings import KEEP
from rflow_jax.verifiers.geneval import RELATIONS
from rflow_jax.vlm.qwen_processing import CLIP_MEAN, CLIP_STD
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes, parameter_values
from rflow_jax.weights.model_folder import write_json
from rflow_jax.weights.qwen import published_config, published_table
from rflow_jax.weights.saving import atomic_output, save_tensors

CONTEXT = 256  # tokens
END, PAD = "<|im_end|>", "<|endoftext|>"
_MARKS = (
    *(END, PAD, "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    "<|video_pad|>",
)
_PATCH, _MERGE = 8, 2
# Qwen2's own pattern: contractions, words with the space before them, digits one by one, and so on.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in p %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def words() -> tuple[str, ...]:
    """Every word of questions, orders and prompts, with the space before it where it has one."""
    prompts = [
        *(Prompt(tuple(map(Wanted, SHAPES[:3]))), Prompt((Wanted(SHAPES[0], count=2),))),
        *(Prompt((Wanted(SHAPES[0], "red"), Wanted(SHAPES[1], "blue")), relation) for relation in RELATIONS),
    ]
    actions = ("color", "replace", "add", "remove", "move")
    edits = [Edit(action, SHAPES[0], SHAPES[1], count).text for action in actions for count in (1, 2)]
    nouns = [*SHAPES, THING, *map(plural, (*SHAPES, THING)), *COLORS, *NUMBERS[: MAX_COUNT + 4]]
    sentences = [
        *(prompt.text for prompt in prompts),
        *(part.question for prompt in prompts for part in requirements(prompt)),
        *(start + edit for edit in edits for start in ("", " ")),
        *(" " + noun for noun in nouns),
        " " + with_article(next(color for color in COLORS if color[0] in "aeiou")),
        *(
            KEEP,
            CONTENT,
            "nothing",
            "yes",
            "no",
            "system",
            "user",
            "assistant",
            "Prompt: What should change in this picture?",
        ),
    ]
    return tuple(sorted({word for text in sentences for word in re.findall(r" ?[A-Za-z]+", text)}))


def tokenizer() -> Tokenizer:
    """Byte pairs as Qwen2's, of which each word is one; the marks of chats come last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pairs([list(word.replace(" ", "\u0120")) for word in words()])
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*alphabet, *map("".join, merges)]))}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORD), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in _MARKS])
    return made


def sizes() -> Qwen25VLConfig:
    """One million parameters; a picture is 36 tokens."""
    known = tokenizer()
    language = Qwen2Config(
        vocab_size=known.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        mrope_section=(4, 6, 6),
    )
    vision = VisionConfig(
        depth=3,
        hidden_size=96,
        intermediate_size=192,
        num_heads=3,
        patch_size=_PATCH,
        spatial_merge_size=_MERGE,
        window_size=SIZE,
        out_hidden_size=128,
        fullatt_block_indexes=(0, 1, 2),
    )
    tokens = {name: known.token_to_id(f"<|{mark}|>") for name, mark in _TOKEN_IDS.items()}
    return Qwen25VLConfig(language, vision, **tokens)


_TOKEN_IDS = {"image_token_id": "image_pad", "vision_start_token_id": "vision_start", "video_token_id": "video_pad"}


def write_start(folder: Path, seed: int = 0) -> int:
    """Writes the model in Transformers' layout, in float32; returns the number of its parameters.

    Raises:
        InputError: ``folder`` exists.
    """
    config = sizes()
    network = abstract_qwen2_5_vl(config)
    draw_parameters(network, seed, prefix="vlm.", factors=_FACTORS)
    values = parameter_values(network)
    names = plan(published_table(network), parameter_shapes(network))
    with atomic_output(folder) as partial:
        partial.mkdir()
        tensors = {key: names.join(key, values) for key in names.entries}
        save_tensors(partial / "model.safetensors", tensors, {"format": "pt"})
        _write_configs(partial, config)
    return sum(value.size for value in values.values())


# Residual branches begin small.
_FACTORS = {r"vlm\..*blocks\.\d+\.(attn\.out|ff\.down)\.kernel": 0.5, r"vlm\.language\.embed\.embedding": 0.1}


def _write_configs(folder: Path, config: Qwen25VLConfig) -> None:
    known = tokenizer()
    ids = {"bos_token_id": known.token_to_id(PAD), "eos_token_id": known.token_to_id(END)}
    ids |= {"pad_token_id": known.token_to_id(PAD)}
    tokens = {name: getattr(config, name) for name in _TOKEN_IDS} | ids
    tokens["vision_end_token_id"] = known.token_to_id("<|vision_end|>")
    write_json(folder / "config.json", published_config(config, "float32", tokens))
    write_json(folder / "generation_config.json", ids)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": _PATCH,
            "merge_size": _MERGE,
            "temporal_patch_size": config.vision.temporal_patch_size,
            "min_pixels": (_PATCH * _MERGE) ** 2,
            "max_pixels": SIZE**2,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
    )
    known.save(str(folder / "tokenizer.json"))
    known.model.save(str(folder))
    marks = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": list(_MARKS)}
    kind = {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "model_max_length": CONTEXT}
    write_json(folder / "tokenizer_config.json", kind | marks | {"clean_up_tokenization_spaces": False})
    write_json(folder / "chat_template.json", {"chat_template": _TEMPLATE})
