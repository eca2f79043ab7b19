"""The condition branch in PyTorch, built on a live diffusers transformer: what ours is held against.

Every product, norm and embedding is done by diffusers' own modules; only the order in which the three streams pass
through them is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

TIME_UNITS = 1000.0
CONDITION_GUIDANCE = 1.0
Stages = dict[str, Tensor]
Module = Any  # torch.nn.Module types each attribute as a tensor or a module, neither of which can be called


@dataclass(frozen=True)
class Flags:
    """How the condition takes part, in the original's words."""

    union_cond_attn: bool = True
    add_cond_attn: bool = False
    latent_lora: bool = False
    condition_scale: float = 1.0
    c_t: float = 0.0


@dataclass
class Tokens:
    """The streams between blocks; ``condition`` is None where there is none."""

    text: Tensor
    image: Tensor
    condition: Tensor | None

    def parts(self) -> list[Tensor]:
        return [x for x in (self.text, self.image, self.condition) if x is not None]


@dataclass(frozen=True)
class Setting:
    """What all blocks share: modulation vectors, rotary tables of all tokens, the attention's bias."""

    flags: Flags
    vector: Tensor
    condition_vector: Tensor | None
    rotary: tuple[Tensor, Tensor]
    bias: Tensor | None


class Lora:
    """Adds ``scale * B A x`` to the outputs of linears, while switched on.

    Args:
        matrices: name of a linear in the model -> (A [r, in], B [out, r]).
    """

    def __init__(self, model: torch.nn.Module, matrices: Mapping[str, tuple[Tensor, Tensor]], scale: float):
        self.acts = False
        self.scale = scale
        self.names = list(matrices)
        for name, (a, b) in matrices.items():
            model.get_submodule(name).register_forward_hook(self._hook(a, b))

    def _hook(self, a: Tensor, b: Tensor) -> Callable:
        def add(_: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + self.scale * F.linear(F.linear(args[0], a), b) if self.acts else out

        return add

    @contextmanager
    def acting(self, on: bool) -> Iterator[None]:
        before, self.acts = self.acts, on
        yield
        self.acts = before


class Reference:
    """A transformer with a condition and a LoRA, in the arrays and names of the recordings."""

    def __init__(
        self,
        model: FluxTransformer2DModel,
        matrices: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        scale: float = 1.0,
    ):
        self.model = model
        self.lora = Lora(model, matrices or {}, scale)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        with self.scaled(0.0):
            yield

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """With another strength of the LoRA."""
        before, self.lora.scale = self.lora.scale, scale
        yield
        self.lora.scale = before

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], flags: Flags = Flags(), stages: Stages | None = None) -> Tensor:
        """The velocity; ``inputs`` as in the recordings, without ``in_``.

        Args:
            stages: filled with every intermediate result, named as in the recordings.
        """
        seen = stages if stages is not None else {}
        tokens = self._embed(inputs, flags, seen)
        setting = self._setting(inputs, flags, seen)
        for k, block in enumerate(self.model.transformer_blocks):
            tokens = self._double(block, tokens, setting)
            names = (f"st_double{k}_txt", f"st_double{k}_img", f"st_double{k}_cond")
            seen.update(zip(names, tokens.parts(), strict=False))
        n_text = tokens.text.shape[1]
        rest, condition = torch.cat([tokens.text, tokens.image], dim=1), tokens.condition
        for k, block in enumerate(self.model.single_transformer_blocks):
            rest, condition = self._single(block, rest, condition, setting)
            seen[f"st_single{k}_txtimg"] = rest
            if condition is not None:
                seen[f"st_single{k}_cond"] = condition
        with self.lora.acting(flags.latent_lora):
            return self.model.proj_out(self.model.norm_out(rest[:, n_text:], setting.vector))

    def _embed(self, inputs: Mapping[str, Tensor], flags: Flags, seen: Stages) -> Tokens:
        condition = inputs.get("condition_latents")
        with self.lora.acting(flags.latent_lora):
            seen["st_x_embed"] = self.model.x_embedder(inputs["hidden_states"])
            seen["st_context_embed"] = self.model.context_embedder(inputs["encoder_hidden_states"])
        if condition is not None:
            with self.lora.acting(True):
                condition = seen["st_x_embed_cond"] = self.model.x_embedder(condition)
        return Tokens(seen["st_context_embed"], seen["st_x_embed"], condition)

    def _setting(self, inputs: Mapping[str, Tensor], flags: Flags, seen: Stages) -> Setting:
        t, pooled = inputs["timestep"], inputs["pooled_projections"]
        with self.lora.acting(flags.latent_lora):
            vector = seen["st_temb"] = self._vector(t, inputs.get("guidance"), pooled)
        rotary = self.model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
        seen["st_rope_cos"], seen["st_rope_sin"] = rotary
        if "condition_latents" not in inputs:
            return Setting(flags, vector, None, rotary, None)
        with self.lora.acting(True):
            guidance = torch.full_like(t, CONDITION_GUIDANCE)
            condition_vector = self._vector(torch.full_like(t, flags.c_t), guidance, pooled)
        turned = self.model.pos_embed(inputs["condition_ids"])
        seen["st_cond_temb"] = condition_vector
        seen["st_cond_rope_cos"], seen["st_cond_rope_sin"] = turned
        cos, sin = (torch.cat(pair) for pair in zip(rotary, turned, strict=True))
        bias = attention_bias(len(rotary[0]), len(turned[0]), flags)
        return Setting(flags, vector, condition_vector, (cos, sin), bias)

    def _vector(self, t: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        embed = self.model.time_text_embed
        if guidance is not None and self.model.config["guidance_embeds"]:
            return embed(t * TIME_UNITS, guidance * TIME_UNITS, pooled)
        return embed(t * TIME_UNITS, pooled)

    def _double(self, block: Module, tokens: Tokens, setting: Setting) -> Tokens:
        latent_lora = setting.flags.latent_lora
        with self.lora.acting(latent_lora):
            text, *text_mod = block.norm1_context(tokens.text, emb=setting.vector)
            image, *image_mod = block.norm1(tokens.image, emb=setting.vector)
            qkv = [text_qkv(block.attn, text), image_qkv(block.attn, image)]
        condition, condition_mod = tokens.condition, []
        if condition is not None:
            with self.lora.acting(True):
                x, *condition_mod = block.norm1(condition, emb=setting.condition_vector)
                qkv.append(image_qkv(block.attn, x))
        attended = attend(qkv, setting)
        with self.lora.acting(latent_lora):
            text_update = text_mod[0][:, None] * block.attn.to_add_out(attended[0])
            image_update = image_mod[0][:, None] * block.attn.to_out[0](attended[1])
            text = feed_forward(block.norm2_context, block.ff_context, tokens.text + text_update, text_mod)
        if condition is not None:
            with self.lora.acting(True):
                update = condition_mod[0][:, None] * block.attn.to_out[0](attended[2])
                condition = feed_forward(block.norm2, block.ff, condition + update, condition_mod)
            if setting.flags.add_cond_attn:
                image_update = image_update + update
        with self.lora.acting(latent_lora):
            image = feed_forward(block.norm2, block.ff, tokens.image + image_update, image_mod)
        return Tokens(text, image, condition)

    def _single(
        self, block: Module, rest: Tensor, condition: Tensor | None, setting: Setting
    ) -> tuple[Tensor, Tensor | None]:
        streams: list[tuple[Tensor, Tensor | None, bool]] = [(rest, setting.vector, setting.flags.latent_lora)]
        if condition is not None:
            streams.append((condition, setting.condition_vector, True))
        qkv, hidden, gates = [], [], []
        for x, vector, acts in streams:
            with self.lora.acting(acts):
                y, gate = block.norm(x, emb=vector)
                qkv.append(image_qkv(block.attn, y))
                hidden.append(block.act_mlp(block.proj_mlp(y)))
                gates.append(gate[:, None])
        out = []
        for (x, _, acts), a, h, gate in zip(streams, attend(qkv, setting), hidden, gates, strict=True):
            with self.lora.acting(acts):
                out.append(x + gate * block.proj_out(torch.cat([a, h], dim=-1)))
        return out[0], out[1] if condition is not None else None


def image_qkv(attn: Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of image and condition tokens, and of all tokens of a single-stream block: [b, s, n, h] each."""
    q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(q), attn.norm_k(k), v


def text_qkv(attn: Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)
    return attn.norm_added_q(q), attn.norm_added_k(k), v


def attend(qkv: list[tuple[Tensor, Tensor, Tensor]], setting: Setting) -> tuple[Tensor, ...]:
    """Attention over all streams; what each of them gets, [b, s, n h]."""
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))
    turn: Any = apply_rotary_emb  # annotated as taking a pair of one, and giving a pair
    q, k = (turn(x, setting.rotary, sequence_dim=1) for x in (q, k))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=setting.bias)
    return out.transpose(1, 2).flatten(2).split([part[0].shape[1] for part in qkv], dim=1)


def attention_bias(n_rest: int, n_condition: int, flags: Flags) -> Tensor | None:
    """Between the condition and the rest; a scale takes the place of the mask."""
    if flags.condition_scale != 1:
        across = torch.log(torch.tensor(flags.condition_scale))
    elif not flags.union_cond_attn:
        across = torch.tensor(-torch.inf)
    else:
        return None
    is_condition = torch.arange(n_rest + n_condition) >= n_rest
    return torch.where(is_condition[:, None] != is_condition[None, :], across, 0.0)


def feed_forward(norm: Module, network: Module, x: Tensor, mod: list[Tensor]) -> Tensor:
    """``mod``: the attention's gate, then shift, scale and gate of this part, [b, d] each."""
    _, shift, scale, gate = (m[:, None] for m in mod)
    return x + gate * network(norm(x) * (1 + scale) + shift)


def euler(velocity: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """x after each step, [steps, b, i, f]; ``velocity`` gets x, the time and the number of the step."""
    trajectory = []
    for k in range(len(sigmas) - 1):
        x = x + (sigmas[k + 1] - sigmas[k]) * velocity(x, sigmas[k], k)
        trajectory.append(x)
    return torch.stack(trajectory)
