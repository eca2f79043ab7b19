"""Several checkpoints seen as one: later ones replace tensors of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.weights.files import TensorFiles


class LayeredFiles(TensorFiles):
    """The tensors of several checkpoints under common names.

    Args:
        layers: checkpoints, the last word last.
        rename: a checkpoint's key -> the common name; None leaves the tensor out.

    Raises:
        InputError: two tensors of one checkpoint with the same common name.
    """

    def __init__(self, layers: Sequence[TensorFiles], rename: Callable[[str], str | None]):
        self._layers = tuple(layers)
        self.files = tuple(file for layer in layers for file in layer.files)
        self.metadata = {}
        self._infos = {}
        self._homes: dict[str, tuple[TensorFiles, str]] = {}
        for layer in layers:
            own: dict[str, str] = {}
            for key in layer:
                if (name := rename(key)) is None:
                    continue
                if name in own:
                    raise InputError(f"{layer.where}: {own[name]} and {key} are both {name}")
                own[name] = key
            self._homes |= {name: (layer, key) for name, key in own.items()}
            self._infos |= {name: replace(layer[key]) for name, key in own.items()}

    @property
    def where(self) -> str:
        """What to call these tensors in a message: every checkpoint, the last word last."""
        return " and ".join(layer.where for layer in self._layers)

    def read(self, key: str) -> np.ndarray:
        files, name = self._homes[key]
        return files.read(name)
