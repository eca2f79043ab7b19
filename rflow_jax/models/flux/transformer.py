"""The FLUX transformer with its condition branch: packed latents, text and a condition -> velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig
from rflow_jax.models.flux.layers import (
    TIME_FEATURES,
    Context,
    DoubleBlock,
    DoubleModulation,
    MLPEmbedder,
    Modulation,
    Rope,
    SingleBlock,
    modulate,
    time_features,
)
from rflow_jax.models.layers import Linear, abstract
from rflow_jax.models.lora import linears, set_adapter
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.partitioning import BATCH, SEQUENCE, TOKENS, constrain, has_axis
from rflow_jax.models.stack import apply_remat, blocks_of, of_some_blocks, over_blocks, stack_blocks
from rflow_jax.typing import Array, Float

CONDITION_GUIDANCE = 1.0  # the guidance of the condition's modulation vector


class Modulations(NamedTuple):
    """The modulations of every block and of the head.

    Lists for a list of blocks; arrays with a leading dimension of blocks for stacked ones.
    """

    double: list[DoubleModulation] | DoubleModulation
    single: list[Float[Array, "b k o"]] | Float[Array, "l b k o"]
    final: Float[Array, "b 1 o"]


class FluxTransformer(nnx.Module):
    """FLUX.1 (dev or schnell) with the condition branch of OminiControl and ReflectionFlow.

    Source: FLUX.1 (Black Forest Labs); OminiControl, arXiv 2411.15098; ReflectionFlow, arXiv 2504.16080.

    Args:
        scan_blocks: the blocks of each kind are stacked (:mod:`rflow_jax.models.stack`), not in a list.
    """

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32, scan_blocks: bool = False):
        d = config.width
        kw = {"rngs": rngs, "dtype": dtype}
        self.config = config
        self.image_in = Linear(config.in_channels, d, **kw)
        self.text_in = Linear(config.joint_attention_dim, d, **kw)
        self.time_in = MLPEmbedder(TIME_FEATURES, d, **kw)
        self.guidance_in = nnx.data(MLPEmbedder(TIME_FEATURES, d, **kw) if config.guidance_embeds else None)
        self.pooled_in = MLPEmbedder(config.pooled_projection_dim, d, **kw)
        double = [DoubleBlock(config, **kw) for _ in range(config.num_layers)]
        single = [SingleBlock(config, **kw) for _ in range(config.num_single_layers)]
        self.double_blocks = blocks_of(double, stacked=scan_blocks)
        self.single_blocks = blocks_of(single, stacked=scan_blocks)
        self.final_mod = Modulation(d, 2, **kw)
        self.final_out = Linear(d, config.in_channels, **kw)

    def __call__(
        self,
        latents: Float[Array, "b i f"],
        text: Float[Array, "b t e"],
        pooled: Float[Array, "b p"],
        t: Float[Array, " b"],
        *,
        rope: Rope,
        guidance: Float[Array, " b"] | None = None,
        condition: Float[Array, "b c f"] | None = None,
        c_t: float | Float[Array, ""] = 0.0,
        condition_scale: Float[Array, ""] | None = None,
        flags: ConditionFlags = ConditionFlags(),
        attention: AttentionImpl = "auto",
        remat: Remat = "none",
    ) -> Float[Array, "b i f"]:
        """The velocity x_1 - x_0 at x_t = (1 - t) x_0 + t x_1.

        Args:
            latents: packed noisy latents x_t; their dtype is that of the computation.
            text: T5's hidden states.
            pooled: CLIP's pooled embedding.
            t: time in [0, 1], 1 is noise.
            rope: angles of [text, image, condition] (:func:`rflow_jax.flow.rope_for`).
            guidance: the distilled guidance in the user's units (3.5); unused by networks without it.
            condition: packed clean latents of the image to correct.
            c_t: the condition's time.
            condition_scale: strength of the attention between the condition and the rest; None is 1.
            flags, attention: see their classes.
            remat: see :data:`rflow_jax.models.options.Remat`.

        Raises:
            InputError: flags that exclude each other, or that don't fit the number of tokens.
        """
        ctx = self.context(latents.shape[1], condition, rope, condition_scale, flags, attention, remat)
        modulations = self.modulations(t, guidance, pooled, c_t, latents.dtype, ctx)
        return self.velocity(latents, text, condition, modulations, ctx)

    def modulations(
        self,
        t: Float[Array, " b"],
        guidance: Float[Array, " b"] | None,
        pooled: Float[Array, "b p"],
        c_t: float | Float[Array, ""],
        dtype: Dtype,
        ctx: Context,
    ) -> Modulations:
        """The modulations of every block, which depend on no token.

        A sampler computes those of all its steps in one batch: their weights are a quarter of the network's, and are
        then read once per image instead of once per step.
        """
        vector = self.embed_vectors(t, guidance, pooled, c_t, dtype, ctx)

        def modulation(block: DoubleBlock | SingleBlock, _: None, __: None) -> tuple[None, Any]:
            return None, block.modulation(vector, ctx)

        _, double = over_blocks(self.double_blocks, modulation, None)
        _, single = over_blocks(self.single_blocks, modulation, None)
        return Modulations(double, single, self.final_mod(vector[:, :1], ctx.lora_text))

    def velocity(
        self,
        latents: Float[Array, "b i f"],
        text: Float[Array, "b t e"],
        condition: Float[Array, "b c f"] | None,
        modulations: Modulations,
        ctx: Context,
    ) -> Float[Array, "b i f"]:
        """The part of the network that depends on tokens; arguments and result as of :meth:`__call__`."""

        def double(block: DoubleBlock, streams: tuple[Array, Array], modulation: Any) -> tuple[Any, None]:
            text, image = block(*streams, modulation, ctx)
            return (_as_tokens(text), _as_tokens(image)), None

        streams = tuple(map(_as_tokens, self.embed_tokens(latents, text, condition, ctx)))
        (text, image), _ = over_blocks(self.double_blocks, double, streams, modulations.double, remat=ctx.remat)
        x = _as_tokens(jnp.concatenate([text, image], axis=1))
        return self.head(
            self._image_of_single_blocks(x, text.shape[1], modulations.single, ctx), modulations.final, ctx
        )

    def _image_of_single_blocks(
        self, x: Float[Array, "b s d"], text: int, modulations: Any, ctx: Context
    ) -> Float[Array, "b i d"]:
        """[text, image, condition] -> the image behind the single-stream blocks."""

        def single(block: SingleBlock, x: Array, modulation: Array) -> tuple[Array, None]:
            return _as_tokens(block(x, modulation, ctx)), None

        blocks, last, last_modulation = self.single_blocks, None, None
        # Stacked blocks are all alike, and rows of a sequence that is cut over devices lie on few of them.
        if isinstance(blocks, nnx.List) and blocks and not has_axis(SEQUENCE):
            *blocks, last = blocks
            *modulations, last_modulation = modulations
        x, _ = over_blocks(blocks, single, x, modulations, remat=ctx.remat)
        if last is None:
            return x[:, text : x.shape[1] - ctx.n_condition]
        alone = apply_remat(lambda x, modulation: last.image_alone(x, text, modulation, ctx), ctx.remat)
        return alone(x, last_modulation)

    def context(
        self,
        image_tokens: int,
        condition: Array | None,
        rope: Rope,
        condition_scale: Array | None,
        flags: ConditionFlags,
        attention: AttentionImpl = "auto",
        remat: Remat = "none",
    ) -> Context:
        """Checks that the flags fit each other and the tokens. Without a condition they have no effect."""
        if condition is None:
            return Context(rope, flags=flags, attention=attention, remat=remat)
        if condition_scale is not None:
            flags.require_scalable()
        if flags.add_cond_attn and condition.shape[1] != image_tokens:
            raise InputError(
                f"add_cond_attn needs as many condition tokens as image tokens, not {condition.shape[1]} and "
                f"{image_tokens}: give the condition the image's size"
            )
        return Context(rope, condition.shape[1], flags, condition_scale, attention, remat)

    def embed_tokens(
        self, latents: Array, text: Array, condition: Array | None, ctx: Context
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b ic d"]]:
        """Text tokens, and image tokens followed by condition tokens, at the model's width."""
        image = latents if condition is None else jnp.concatenate([latents, condition.astype(latents.dtype)], axis=1)
        embedded = self.image_in(image, ctx.lora_rows(image.shape[1]))
        return self.text_in(text.astype(latents.dtype), ctx.lora_text), embedded

    def embed_vectors(
        self,
        t: Float[Array, " b"],
        guidance: Float[Array, " b"] | None,
        pooled: Float[Array, "b p"],
        c_t: float | Float[Array, ""],
        dtype: Dtype,
        ctx: Context,
    ) -> Float[Array, "b k d"]:
        """The input of the modulations: row 0 for image and text, row 1 (if any) for the condition."""
        rows = ctx.lora_vectors
        times = self._with_condition(t, c_t, ctx)
        vector = self.time_in(time_features(times).astype(dtype), rows)
        if self.guidance_in is not None:
            if guidance is None:
                raise InputError("this network takes a guidance (FLUX.1-dev), and none was given")
            guidances = self._with_condition(guidance, CONDITION_GUIDANCE, ctx)
            vector = vector + self.guidance_in(time_features(guidances).astype(dtype), rows)
        pooled_rows = jnp.broadcast_to(pooled.astype(dtype)[:, None], (*vector.shape[:2], pooled.shape[-1]))
        return vector + self.pooled_in(pooled_rows, rows)

    @staticmethod
    def _with_condition(value: Array, of_condition: float | Array, ctx: Context) -> Float[Array, "b k"]:
        """[b] -> [b, 1], or [b, 2] with the condition's value beside it."""
        columns = [value.astype(jnp.float32)]
        if ctx.n_condition:
            columns.append(jnp.broadcast_to(jnp.asarray(of_condition, jnp.float32), value.shape))
        return jnp.stack(columns, axis=1)

    def head(
        self, image: Float[Array, "b i d"], modulation: Float[Array, "b 1 o"], ctx: Context
    ) -> Float[Array, "b i f"]:
        """Image tokens -> velocity of the packed latents."""
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return self.final_out(modulate(image, shift, scale), ctx.lora_text)


def _as_tokens(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """The sharding between blocks: samples and tokens are cut, channels whole, or the compiler may gather instead."""
    return constrain(x, BATCH, TOKENS)


def abstract_flux(config: FluxConfig, dtype: Dtype = jnp.float32, *, scan_blocks: bool = False) -> FluxTransformer:
    """The network as shapes, to be filled by a loader or counted."""
    return abstract(lambda rngs: FluxTransformer(config, rngs=rngs, dtype=dtype, scan_blocks=scan_blocks))


@dataclass(frozen=True)
class FluxGraph:
    """A transformer without parameters.

    Attributes:
        graph: NNX's part of it.
        config: its sizes.
        scan_blocks: whether blocks are stacked. Parameters may still be given by block.
    """

    graph: nnx.GraphDef[FluxTransformer]
    config: FluxConfig
    scan_blocks: bool = False

    @classmethod
    def of(cls, network: FluxTransformer, *, scan_blocks: bool) -> FluxGraph:
        """The structure of a network with its adapters.

        Args:
            network: with blocks in lists.
            scan_blocks: whether those of the result are stacked.
        """
        config = network.config
        if not scan_blocks:
            return cls(nnx.graphdef(network), config)
        stacked = abstract_flux(config, scan_blocks=True)
        state = jax.eval_shape(lambda state: stack_blocks(state, block_counts(config)), nnx.state(network))
        modules = linears(stacked)
        adapters: dict[str, dict[str, Any]] = {}
        for path, variable in nnx.to_flat_state(state):
            if str(path[-1]).startswith("lora_"):
                adapters.setdefault(".".join(map(str, path[:-1])), {})[str(path[-1])] = variable.get_value()
        for path, values in adapters.items():
            set_adapter(modules[path], values)
        return cls(nnx.graphdef(stacked), config, True)

    def merge(self, *states: nnx.State) -> FluxTransformer:
        """The network with these parameters, by block or stacked."""
        return nnx.merge(self.graph, *(self.stacked(state) for state in states))

    def require_stackable(self, chosen: nnx.State) -> None:
        """Raises InputError for trained parameters that only some of the stacked blocks have."""
        if self.scan_blocks and (path := of_some_blocks(chosen, block_counts(self.config))):
            raise InputError(
                f"trainable_parameters names {path} of some blocks only, and stacked blocks move together: set "
                "train.scan_blocks to false"
            )

    def stack_loaded(self, state: nnx.State) -> nnx.State:
        """As :meth:`stacked` for parameters on devices, outside of any program; those given are deleted."""
        return stack_blocks(state, block_counts(self.config), free=True) if self.scan_blocks else state

    def stacked(self, state: nnx.State) -> nnx.State:
        """Parameters in the network's form."""
        return stack_blocks(state, block_counts(self.config)) if self.scan_blocks else state


def block_counts(config: FluxConfig) -> dict[str, int]:
    """Numbers of blocks by the name of their list."""
    return {"double_blocks": config.num_layers, "single_blocks": config.num_single_layers}
