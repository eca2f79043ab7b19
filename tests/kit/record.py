"""Makes recordings laid out like ``tests/golden`` from random models of any sizes, computed by PyTorch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.kit.compare import save_arrays
from tests.kit.torch_generation import PER_STEP, Arrays, TorchPipeline, grid_ids
from tests.kit.torch_reference import Flags, Reference, Stages

GOLDEN = Path(__file__).parents[1] / "golden"
REFLECTION_FLOW = (
    r"x_embedder"
    r"|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
DEV_SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL_SCHEDULE = {"use_dynamic_shifting": False, "shift": 1.0}
DEFAULT_FLAGS = {"union_cond_attn": True, "add_cond_attn": False, "latent_lora": False}
SQUARE_SIDE, MANY_STEPS = 40, 28  # of the schedule's recordings; in tokens
Size = tuple[int, int]  # rows and columns, or height and width


@dataclass(frozen=True)
class Run:
    """A generation: what differs from the defaults."""

    condition: bool = True
    image_guidance_scale: float = 1.0
    condition_scale: float = 1.0
    guidance_scale: float = 3.5
    flags: Mapping[str, bool] = field(default_factory=dict)


RUNS = {
    "nocond": Run(condition=False),
    "cond": Run(),
    "igs2_fixed": Run(image_guidance_scale=2.0),
    "igs2_fixed_perstep": Run(image_guidance_scale=2.0),
    "cscale": Run(condition_scale=0.6),
    "union_false": Run(guidance_scale=2.0, flags={"union_cond_attn": False}),
}


@dataclass(frozen=True)
class Sizes:
    """What a recording is made of; the networks' sizes in the words of their own configurations.

    Attributes:
        batch, text_tokens, grid, condition_grid: of the transformer's recordings (01 to 03), grids in tokens.
        picture, condition_picture: pixels, of the autoencoder's recordings and the generations.
        odd_picture: pixels that the network cannot take as they are.
        images: of each generation, all of one prompt.
        delta: moves the condition's positions.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: DEV_SCHEDULE)
    lora_modules: str = REFLECTION_FLOW
    lora_rank: int = 2
    lora_alpha: float = 2.0
    batch: int = 2
    text_tokens: int = 5
    grid: Size = (2, 3)
    condition_grid: Size = (1, 2)
    delta: Size = (0, -2)
    condition_scales: tuple[float, ...] = (0.6, 1.7)
    c_t: float = 0.25
    picture: Size = (32, 32)
    condition_picture: Size = (16, 16)
    odd_picture: Size = (21, 35)
    images: int = 1
    steps: int = 3
    max_sequence_length: int = 24
    long_sequence_length: int = 40
    runs: Mapping[str, Run] = field(default_factory=lambda: RUNS)
    seed: int = 0

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank


def record(dst: Path, sizes: Sizes) -> None:
    """Writes models, a LoRA and what they compute below ``dst``."""
    draw = torch.Generator().manual_seed(sizes.seed)
    write_models(dst / "pipeline", sizes, draw)
    pipe = FluxPipeline.from_pretrained(dst / "pipeline")
    matrices = write_lora(dst / "lora", pipe.transformer, sizes, draw)
    recorder = Recorder(dst / "golden", pipe, Reference(pipe.transformer, matrices, sizes.lora_scale), sizes, draw)
    recorder.write()


def write_models(folder: Path, sizes: Sizes, draw: torch.Generator) -> None:
    """A FLUX folder of random weights; its tokenizers are those of the recordings of the original."""
    clip, t5 = CLIPTextConfig(**sizes.clip), T5Config(**sizes.t5, feed_forward_proj="gated-gelu")
    networks = {
        "transformer": FluxTransformer2DModel(**sizes.transformer),
        "vae": AutoencoderKL(**sizes.vae),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }
    for name, network in networks.items():
        draw_weights(network, draw)
        network.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(**sizes.scheduler).save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(GOLDEN / "pipeline" / name, folder / name)
    shutil.copy(GOLDEN / "pipeline" / "model_index.json", folder)


@torch.no_grad()
def draw_weights(network: torch.nn.Module, draw: torch.Generator) -> None:
    """No bias and no norm is left idle; outputs keep the size of inputs."""
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim == 1:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def write_lora(
    folder: Path, model: FluxTransformer2DModel, sizes: Sizes, draw: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Saves random adapters as diffusers does and returns them."""
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(sizes.lora_modules, name):
            a = torch.randn(sizes.lora_rank, module.in_features, generator=draw) / math.sqrt(module.in_features)
            b = torch.randn(module.out_features, sizes.lora_rank, generator=draw) / math.sqrt(sizes.lora_rank)
            matrices[name] = (a, b / 4)
    layers = {
        f"{name}.lora_{part}.weight": m for name, pair in matrices.items() for part, m in zip("AB", pair, strict=True)
    }
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return matrices


class Recorder:
    """Computes and writes the files of ``golden/``."""

    def __init__(self, folder: Path, pipe: FluxPipeline, reference: Reference, sizes: Sizes, draw: torch.Generator):
        folder.mkdir(parents=True)
        self.folder, self.pipe, self.reference, self.sizes, self.draw = folder, pipe, reference, sizes, draw
        self.pipeline = TorchPipeline(pipe, reference)
        self.prompts: list[str] = json.loads((GOLDEN / "golden" / "prompts.json").read_text())

    @torch.no_grad()
    def write(self) -> None:
        inputs = self._transformer_inputs()
        condition = self._condition(self.sizes.condition_grid, self.sizes.delta)
        self._save("01_transformer_nocond", as_inputs(inputs) | self.plain(inputs))
        inputs |= condition
        self._save("02_transformer_cond", as_inputs(inputs) | self.conditioned(inputs))
        self._save("03_variants", self.variants(inputs))
        self._save("04_vae", self.autoencoder())
        self._save("05_text", self.text())
        self._save("06_scheduler", self.schedule())
        self._json("generate_meta", meta := self.generate_meta())
        self._save("07_generate", self.generation(meta))
        self._json("prompts", self.prompts)
        modules = self.reference.lora.names
        self._json("lora_keys", sorted(f"transformer.{m}.lora_{part}.weight" for m in modules for part in "AB"))
        self._json("verify_meta", self.verify_meta())

    def plain(self, inputs: Mapping[str, Tensor]) -> Stages:
        with self.reference.without_lora():
            base = self.reference(inputs)
            diffusers = self.pipe.transformer(**inputs, return_dict=False)[0]
        latent = self.reference(inputs, Flags(latent_lora=True))
        loaded = self.reference(inputs)
        return {"out": base, "out_diffusers": diffusers, "out_lora_loaded": loaded, "out_lora_latent": latent}

    def conditioned(self, inputs: Mapping[str, Tensor]) -> Stages:
        stages: Stages = {}
        stages["out"] = self.reference(inputs, stages=stages)
        with self.reference.without_lora():
            stages["out_nolora"] = self.reference(inputs)
        with self.reference.scaled(1.0):
            stages["out_reloaded"] = self.reference(inputs)
        return stages

    def variants(self, inputs: Mapping[str, Tensor]) -> Arrays:
        grid, run = self.sizes.grid, self.reference
        condition = self._condition(grid, (0, -grid[1]))
        full = {f"condition_{kind}_full": condition[f"condition_{kind}"] for kind in ("latents", "ids")}
        with_full = dict(inputs) | {key.removesuffix("_full"): value for key, value in full.items()}
        apart, latent = {"union_cond_attn": False}, {"latent_lora": True}
        out = {
            "out_union_false": run(inputs, Flags(**apart)),
            "out_latent_lora": run(inputs, Flags(**latent)),
            "out_union_false_latent_lora": run(inputs, Flags(**apart, **latent)),
            "out_add_cond_attn": run(with_full, Flags(add_cond_attn=True)),
            "out_full_default": run(with_full),
            "out_all_flags": run(with_full, Flags(**apart, **latent, add_cond_attn=True)),
            "out_c_t": run(inputs, Flags(c_t=self.sizes.c_t)),
        }
        scales = {f"c_factor{k}": scale for k, scale in enumerate(self.sizes.condition_scales)}
        out |= {f"out_{name}": run(inputs, Flags(condition_scale=scale)) for name, scale in scales.items()}
        first = next(iter(scales))
        out[f"out_{first}_union_false"] = run(inputs, Flags(condition_scale=scales[first], **apart))
        return as_inputs(full) | {f"in_{k}": np.asarray(v, np.float32) for k, v in scales.items()} | as_arrays(out)

    def autoencoder(self) -> Arrays:
        height, width = self.sizes.picture
        images = np.stack([self._picture(height, width) for _ in range(2)])
        preprocess = self.pipe.image_processor.preprocess
        posterior = self.pipe.vae.encode(preprocess([Image.fromarray(i) for i in images])).latent_dist
        noise, z = self._normal(*posterior.mean.shape), self._normal(*posterior.mean.shape)
        both = [self.pipeline.encode(Image.fromarray(i), n[None].numpy()) for i, n in zip(images, noise, strict=True)]
        arrays = {
            "in_images_uint8": images,
            "in_noise": noise,
            "in_z": z,
            "enc_mean": posterior.mean,
            "enc_std": posterior.std,
            "enc_logvar": posterior.logvar,
            "dec": self.pipe.vae.decode(z, return_dict=False)[0],
            "tokens": torch.cat(both),
            "ids": grid_ids(*self._grid(images[0])),
        }
        odd = self._encoded("odd", self.sizes.odd_picture)
        arrays["odd_preprocessed"] = preprocess(Image.fromarray(odd["in_odd_uint8"]))
        return as_arrays(arrays | odd | self._encoded("cond", self.sizes.condition_picture))

    def _encoded(self, name: str, size: Size) -> dict[str, Any]:
        """One picture of any size as tokens."""
        pixels = self._picture(*size)
        rows, columns = self._grid(pixels)
        noise = self._noise(rows, columns).numpy()
        return {
            f"in_{name}_uint8": pixels,
            f"in_{name}_noise": noise,
            f"{name}_tokens": self.pipeline.encode(Image.fromarray(pixels), noise),
            f"{name}_ids": grid_ids(rows, columns),
        }

    def text(self) -> Arrays:
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_2
        short, long = self.sizes.max_sequence_length, self.sizes.long_sequence_length
        first = (short + long) // 2
        ids = {
            "clip_input_ids": self._ids(clip, clip.model_max_length),
            "t5_input_ids": self._ids(t5, short),
            f"t5_input_ids_{long}": self._ids(t5, long),
        }
        encoded = self.pipe.text_encoder(ids["clip_input_ids"])
        states = {key: self.pipe.text_encoder_2(value)[0] for key, value in ids.items() if key.startswith("t5")}
        arrays = ids | {
            "clip_pooled": encoded.pooler_output,
            "clip_last_hidden_state": encoded.last_hidden_state,
            "t5_embeds": states["t5_input_ids"],
            f"t5_embeds_{long}_first{first}": states[f"t5_input_ids_{long}"][:, :first],
            "text_ids": torch.zeros(short, 3),
        }
        for name, tokenizer in (("clip", clip), ("t5", t5)):
            lengths = [len(tokenizer(prompt, truncation=False).input_ids) for prompt in self.prompts]
            arrays[f"{name}_untruncated_len"] = np.asarray(lengths, np.int32)
        return as_arrays(arrays)

    def _ids(self, tokenizer: Any, length: int) -> Tensor:
        how = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(self.prompts, **how).input_ids

    def schedule(self) -> Arrays:
        arrays = {}
        rows, columns = (side // self.pipeline.token_pixels for side in self.sizes.picture)
        square = str(SQUARE_SIDE * self.pipeline.token_pixels)
        for size, tokens in ((square, SQUARE_SIDE**2), ("tiny", rows * columns)):
            for steps in (1, self.sizes.steps, MANY_STEPS):
                mu, timesteps, sigmas = self.pipeline.schedule(steps, tokens)
                arrays[f"timesteps_{size}_{steps}"], arrays[f"sigmas_{size}_{steps}"] = timesteps, sigmas
            arrays[f"mu_{size}"] = np.float32(mu)
        return as_arrays(arrays)

    def generate_meta(self) -> dict[str, Any]:
        height, width = self.sizes.picture
        return {
            "prompt": "a photo of a bench",
            "prompt_2": "a photo of a bench [Reflexion] Add a second one, in a café.",
            "height": height,
            "width": width,
            "num_inference_steps": self.sizes.steps,
            "guidance_scale": Run.guidance_scale,
            "max_sequence_length": self.sizes.max_sequence_length,
            "runs": {name: self._run_meta(run) for name, run in self.sizes.runs.items()},
        }

    def _run_meta(self, run: Run) -> dict[str, Any]:
        calls = self.sizes.steps + 1 if run.image_guidance_scale != 1 else 2
        return {
            "encode_calls": calls if run.condition else 0,
            "image_guidance_scale": run.image_guidance_scale,
            "condition_scale": run.condition_scale,
            "guidance_scale": run.guidance_scale,
            "model_config": DEFAULT_FLAGS | dict(run.flags),
        }

    def generation(self, meta: Mapping[str, Any]) -> Arrays:
        pixels = self._picture(*self.sizes.condition_picture)
        grid = self._grid(pixels)
        rows, columns = (side // self.pipeline.token_pixels for side in self.sizes.picture)
        inputs = {
            "in_latents": self._normal(self.sizes.images, rows * columns, self.pipe.transformer.config.in_channels),
            "in_cond_uint8": pixels,
            "in_cond_noise": self._noise(*grid),
            "in_position_delta": torch.tensor(self.sizes.delta, dtype=torch.float32),
        }
        if any(name.endswith(PER_STEP) for name in meta["runs"]):
            inputs["in_perstep_noise"] = torch.stack([self._noise(*grid) for _ in range(self.sizes.steps + 1)])
        arrays = as_arrays(inputs)
        text, pooled = self.pipeline.texts(meta, self.sizes.images)
        arrays |= as_arrays({"prompt_embeds": text, "pooled": pooled})
        for name in meta["runs"]:
            arrays |= {f"{name}_{key}": value for key, value in self.pipeline.run(meta, name, arrays)}
        return arrays

    def verify_meta(self) -> dict[str, Any]:
        own, golden = self.sizes, json.loads((GOLDEN / "golden" / "verify_meta.json").read_text())
        lora = {
            "rank": own.lora_rank,
            "alpha": own.lora_alpha,
            "scale": own.lora_scale,
            "scale_of_out_reloaded": 1.0,
        }
        same = {key: golden[key] for key in ("exempt", "tolerance", "error")}
        return {"lora": lora, "c_t_of_out_c_t": own.c_t} | same

    def _transformer_inputs(self) -> dict[str, Tensor]:
        own, config = self.sizes, self.pipe.transformer.config
        rows, columns = own.grid
        inputs = {
            "hidden_states": self._normal(own.batch, rows * columns, config.in_channels),
            "encoder_hidden_states": self._normal(own.batch, own.text_tokens, config.joint_attention_dim),
            "pooled_projections": self._normal(own.batch, config.pooled_projection_dim),
            "timestep": torch.rand(own.batch, generator=self.draw),
            "img_ids": grid_ids(rows, columns),
            "txt_ids": torch.zeros(own.text_tokens, 3),
        }
        if config.guidance_embeds:
            inputs["guidance"] = 1 + 4 * torch.rand(own.batch, generator=self.draw)
        return inputs

    def _condition(self, grid: Size, delta: Size) -> dict[str, Tensor]:
        rows, columns = grid
        return {
            "condition_latents": self._normal(
                self.sizes.batch, rows * columns, self.pipe.transformer.config.in_channels
            ),
            "condition_ids_nodelta": grid_ids(rows, columns),
            "position_delta": torch.tensor(delta, dtype=torch.float32),
            "condition_ids": grid_ids(rows, columns, delta),
        }

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def _noise(self, rows: int, columns: int) -> Tensor:
        """A draw of the posterior of a picture of so many tokens."""
        return self._normal(1, self.pipe.vae.config.latent_channels, 2 * rows, 2 * columns)

    def _picture(self, height: int, width: int) -> np.ndarray:
        """Noise over a slope, so that resizing has something smooth and something rough to work on."""
        slope = torch.linspace(0, 128, height)[:, None, None] + torch.zeros(height, width, 3)
        return (slope + 127 * torch.rand(height, width, 3, generator=self.draw)).to(torch.uint8).numpy()

    def _grid(self, pixels: np.ndarray) -> Size:
        rows, columns = (side // self.pipeline.token_pixels for side in pixels.shape[:2])
        return rows, columns

    def _save(self, name: str, arrays: Mapping[str, Any]) -> None:
        save_arrays(self.folder / f"{name}.npz", as_arrays(arrays))

    def _json(self, name: str, content: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def as_inputs(tensors: Mapping[str, Tensor]) -> Arrays:
    return {f"in_{name}": tensor.numpy() for name, tensor in tensors.items()}


def as_arrays(values: Mapping[str, Any]) -> Arrays:
    return {name: value.numpy() if isinstance(value, Tensor) else np.asarray(value) for name, value in values.items()}
