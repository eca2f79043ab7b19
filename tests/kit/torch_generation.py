"""Whole generations in PyTorch: diffusers' autoencoder, text encoders and schedule around the reference transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from PIL import Image
from torch import Tensor

from tests.kit.torch_reference import Flags, Reference, euler

PATCH = 2
BLACK_GUIDANCE = 1.0
PER_STEP = "_perstep"  # runs so named draw anew for the black image of every step
Arrays = dict[str, np.ndarray]


class TorchPipeline:
    """A FLUX pipeline with the condition branch."""

    def __init__(self, pipe: FluxPipeline, reference: Reference):
        self.pipe = pipe
        self.reference = reference

    @property
    def token_pixels(self) -> int:
        return self.pipe.vae_scale_factor * PATCH

    @torch.no_grad()
    def encode(self, image: Image.Image, noise: np.ndarray) -> Tensor:
        """A picture as tokens [1, s, f], with the given draw of the posterior."""
        vae = self.pipe.vae
        posterior = vae.encode(self.pipe.image_processor.preprocess(image)).latent_dist
        sample = posterior.mean + posterior.std * torch.from_numpy(noise)
        return packed((sample - vae.config.shift_factor) * vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens -> [b, 3, y, x], not clipped."""
        vae = self.pipe.vae
        latents = self.pipe._unpack_latents(tokens, height, width, self.pipe.vae_scale_factor)
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def schedule(self, steps: int, tokens: int) -> tuple[float, Tensor, Tensor]:
        """(mu, timesteps, sigmas)."""
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        limits = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        mu = calculate_shift(tokens, *limits)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return mu, scheduler.timesteps, scheduler.sigmas

    @torch.no_grad()
    def texts(self, meta: Mapping[str, Any], images: int) -> tuple[Tensor, Tensor]:
        """(T5's states, CLIP's pooled), a row for each image of the one prompt."""
        states, pooled, _ = self.pipe.encode_prompt(
            meta["prompt"],
            meta["prompt_2"],
            num_images_per_prompt=images,
            max_sequence_length=meta["max_sequence_length"],
        )
        assert states is not None
        assert pooled is not None
        return states, pooled

    @torch.no_grad()
    def run(self, meta: Mapping[str, Any], name: str, z: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """One run of ``generate_meta.json`` with the input arrays of the recordings: name of an array -> array."""
        how = meta["runs"][name]
        images = len(z["in_latents"])
        text, pooled = self.texts(meta, images)
        inputs = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(text.shape[1], 3)}
        inputs["img_ids"] = grid_ids(meta["height"] // self.token_pixels, meta["width"] // self.token_pixels)
        blacks: list[Tensor] = []
        if how["encode_calls"]:
            calls = self._condition_calls(meta, name, z)
            yield "enc_tokens", torch.cat(calls).numpy()
            condition, *blacks = (tokens.expand(images, -1, -1) for tokens in calls)
            inputs |= {"condition_latents": condition, "condition_ids": self._condition_ids(z)}
        x = torch.from_numpy(z["in_latents"])
        _, _, sigmas = self.schedule(meta["num_inference_steps"], x.shape[1])
        steps = euler(lambda x, t, k: self._velocity(inputs, how, blacks, x, t, k), x, sigmas)
        raw = self.decode(steps[-1], meta["height"], meta["width"])
        yield "latents_steps", steps.numpy()
        yield "image_raw", raw.numpy()
        processed: Any = self.pipe.image_processor.postprocess(raw)  # annotated as one picture too
        pictures = [np.asarray(picture) for picture in processed]
        yield "image_uint8", pictures[0] if images == 1 else np.stack(pictures)

    def _velocity(
        self, inputs: dict[str, Tensor], how: Mapping[str, Any], blacks: list[Tensor], x: Tensor, t: Tensor, k: int
    ) -> Tensor:
        flags = Flags(**how["model_config"], condition_scale=how["condition_scale"])
        guidance, black_guidance = (torch.full((len(x),), g) for g in (how["guidance_scale"], BLACK_GUIDANCE))
        now = inputs | {"hidden_states": x, "timestep": t.expand(len(x)), "guidance": guidance}
        velocity = self.reference(now, flags)
        scale = how["image_guidance_scale"]
        if scale == 1:
            return velocity
        now |= {"condition_latents": blacks[k], "guidance": black_guidance}
        black = self.reference(now, flags)
        return black + scale * (velocity - black)

    def _condition_calls(self, meta: Mapping[str, Any], name: str, z: Mapping[str, np.ndarray]) -> list[Tensor]:
        """What the original's calls of its encoder give: the condition, then black for every step or itself again."""
        picture, how = Image.fromarray(z["in_cond_uint8"]), meta["runs"][name]
        black = Image.new("RGB", picture.size)
        guided = how["image_guidance_scale"] != 1
        pictures = [picture] + [black if guided else picture] * (how["encode_calls"] - 1)
        same = [z["in_cond_noise"]] * len(pictures)
        draws = z["in_perstep_noise"] if name.endswith(PER_STEP) else same
        return [self.encode(one, draw) for one, draw in zip(pictures, draws, strict=True)]

    def _condition_ids(self, z: Mapping[str, np.ndarray]) -> Tensor:
        rows, columns = (side // self.token_pixels for side in z["in_cond_uint8"].shape[:2])
        return grid_ids(rows, columns, z["in_position_delta"])


def packed(latents: Tensor) -> Tensor:
    """[b, z, y, x] -> [b, s, 4 z]."""
    b, z, y, x = latents.shape
    return FluxPipeline._pack_latents(latents, b, z, y, x)


def grid_ids(rows: int, columns: int, delta: np.ndarray | tuple[float, float] = (0, 0)) -> Tensor:
    """[s, 3] positions (0, row, column), moved by ``delta``."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    moved = [torch.zeros(rows, columns), row + float(delta[0]), column + float(delta[1])]
    return torch.stack(moved, dim=-1).reshape(-1, 3)
