"""The Qwen2 decoder against Transformers, at once and token by token."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2.generation import Decoding, Prompts, generate
from rflow_jax.models.qwen2.model import abstract_qwen2
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import load_into, parameter_shapes
from rflow_jax.weights.mappings import qwen as names
from rflow_jax.weights.safetensors_io import TensorFiles
from tests.kit.compare import relative_error
from tests.kit.torch_models import on_meta, randomise, shapes_of

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
PAD, END = 0, 5

CONFIGS = {
    "three heads a key": {
        "vocab_size": 70,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    },
    "tied, one key head": {
        "vocab_size": 90,
        "hidden_size": 40,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-4,
        "tie_word_embeddings": True,
    },
}
LENGTHS = [9, 4, 1, 7]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(Transformers' module, ours read from its folder)."""
    torch.manual_seed(0)
    reference = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**CONFIGS[request.param]))
    randomise(reference, 1)
    folder = tmp_path_factory.mktemp("qwen2")
    reference.save_pretrained(folder, max_shard_size="60KB")
    config = Qwen2Config.from_json(json.loads((folder / "config.json").read_text()))
    files = TensorFiles.open(folder)
    table = names.qwen2_mapping(head=not config.tie_word_embeddings)
    return reference, load_into(abstract_qwen2(config), table, files)


def prompts_of(model, rows: list[np.ndarray], padded: int, keys=None) -> Prompts:
    """Prompts of token ids, padded on the right."""
    ids = np.full((len(rows), padded), PAD)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = jnp.asarray([len(tokens) for tokens in rows], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(padded), ids.shape)
    live = jnp.ones(len(rows), bool)
    return Prompts(model.embed(jnp.asarray(ids)), positions, lengths, lengths, live, keys)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(6, 70, length) for length in LENGTHS]


@partial(jax.jit, static_argnums=(0, 3))
def _run(graph, state, prompts, decoding):
    return generate(nnx.merge(graph, state), prompts, decoding)


def made(model, prompts: Prompts, **how):
    decoding = Decoding(**{"max_new_tokens": 8, "eos": (END,), "pad": PAD, "keep_logits": True} | how)
    with jax.default_matmul_precision("highest"):
        return _run(*nnx.split(model), prompts, decoding)


def theirs(reference, tokens: np.ndarray, **how):
    """(new tokens, logits) of one prompt, greedily."""
    how = {"max_new_tokens": 8, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False} | how
    with torch.no_grad():
        out = reference.generate(
            torch.from_numpy(tokens)[None], return_dict_in_generate=True, output_logits=True, use_cache=True, **how
        )
    return out.sequences[0, len(tokens) :].numpy(), torch.stack(out.logits, 1)[0].numpy()


@pytest.mark.parametrize("length", [1, 30, 200])
def test_hidden_states_and_logits(pair, length):
    reference, model = pair
    ids = np.random.default_rng(length).integers(0, 70, (2, length))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids), output_hidden_states=True)
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    with jax.default_matmul_precision("highest"):
        hidden = jax.jit(model)(model.embed(jnp.asarray(ids)), positions)
        logits = model.logits(hidden)
    assert relative_error(hidden, want.hidden_states[-1]) < TOLERANCE
    assert relative_error(logits, want.logits) < TOLERANCE


def test_right_padding_is_not_seen(pair, rows):
    reference, model = pair
    prompts = prompts_of(model, rows, 13)
    with jax.default_matmul_precision("highest"):
        hidden = jax.jit(model)(prompts.x, prompts.positions)
    for tokens, ours in zip(rows, hidden, strict=True):
        with torch.no_grad():
            want = reference.model(torch.from_numpy(tokens)[None]).last_hidden_state[0]
        assert relative_error(ours[: len(tokens)], want) < TOLERANCE


def test_a_batch_is_generated_as_each_alone(pair, rows):
    """Different lengths, one padding; every token and every logit is Transformers' of that prompt alone."""
    reference, model = pair
    ours = made(model, prompts_of(model, rows, 12))
    for k, tokens in enumerate(rows):
        want, logits = theirs(reference, tokens)
        np.testing.assert_array_equal(ours.tokens[k, : len(want)], want)
        assert ours.lengths[k] == len(want)
        assert np.all(np.asarray(ours.tokens[k, len(want) :]) == PAD)
        assert relative_error(ours.logits[k, : len(want)], logits) < TOLERANCE


def test_an_end_is_held_back(pair, rows):
    """With an end token that comes early: it stops the text, or waits for min_new_tokens."""
    reference, model = pair
    free = theirs(reference, rows[0], eos_token_id=None)[0]
    end = int(free[1])
    for least in (0, 6):
        want = theirs(reference, rows[0], eos_token_id=end, min_new_tokens=least)[0]
        ours = made(model, prompts_of(model, rows, 12), eos=(end,), min_new_tokens=least)
        assert ours.lengths[0] == len(want)
        np.testing.assert_array_equal(ours.tokens[0, : len(want)], want)
    assert len(theirs(reference, rows[0], eos_token_id=end)[0]) < 8


def test_sampling_is_the_samples_own(pair, rows):
    """Drawn tokens depend on the prompt and the key, not on neighbours or padding."""
    _, model = pair
    keys = jax.random.split(jax.random.key(3), len(rows))
    how = {"temperature": 1.5, "top_p": 0.9}
    together = made(model, prompts_of(model, rows, 12, keys), **how)
    for k, tokens in enumerate(rows):
        alone = made(model, prompts_of(model, [tokens], 9, keys[k : k + 1]), **how)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[k])
    others = made(model, prompts_of(model, rows, 12, keys[::-1]), **how)
    assert np.any(np.asarray(others.tokens) != np.asarray(together.tokens))


def test_loop_ends_when_all_have(pair, rows):
    """A row of filling makes nothing, and tokens after the end are padding."""
    _, model = pair
    prompts = prompts_of(model, rows, 12)
    ours = made(model, prompts._replace(live=jnp.asarray([True, False, True, False])))
    assert list(ours.lengths[jnp.asarray([1, 3])]) == [0, 0]
    assert np.all(np.asarray(ours.tokens)[[1, 3]] == PAD)


def test_parameters_of_real_sizes():
    for config, parameters in REAL.values():
        theirs = transformers.Qwen2Config(**vars(config) | {"mrope_section": None})
        meta = on_meta(transformers.Qwen2ForCausalLM, theirs)
        assert sum(p.numel() for p in meta.parameters()) == parameters
        the_plan = plan(
            names.qwen2_mapping(head=not config.tie_word_embeddings), parameter_shapes(abstract_qwen2(config))
        )
        the_plan.check(shapes_of(meta), "meta device")


REAL = {
    "Qwen2.5-VL 7B": (Qwen2Config(), 7_615_616_512),
    "Qwen2 1.5B": (
        Qwen2Config(151_648, 1536, 8960, 28, 12, 2, tie_word_embeddings=True, max_position_embeddings=32_768),
        1_543_271_936,
    ),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"num_attention_heads": 5}, "heads of even width"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}, "add up to half"),
        ({"hidden_act": "gelu"}, "has 'silu'"),
    ],
)
def test_other_networks_are_refused(change, message):
    base = CONFIGS["three heads a key"] | {"model_type": "qwen2"}
    with pytest.raises(InputError, match=message):
        Qwen2Config.from_json(base | change)
