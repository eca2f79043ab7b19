"""The names of NVILA's projector in VILA's checkpoints: layers by number, the activations counted."""

from __future__ import annotations

from rflow_jax.weights.tables import Rule, Table

PROJECTOR = Table(
    "NVILA projector",
    (
        Rule(r"norm_in", "layers.1"),
        Rule(r"reduce", "layers.2"),
        Rule(r"norm", "layers.4"),
        Rule(r"project", "layers.5"),
        Rule(r"out", "layers.7"),
    ),
)
