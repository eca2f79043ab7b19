"""PyTorch modules with weights that leave no part of a network idle."""

from __future__ import annotations

import torch


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Moves biases and norms off zero and one, and makes attention scores large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        amount = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    model.eval()


def on_meta(network: type, *args, **kwargs) -> torch.nn.Module:
    """The module without memory for its parameters."""
    with torch.device("meta"):
        return network(*args, **kwargs)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
