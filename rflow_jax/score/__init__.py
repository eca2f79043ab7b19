"""``infer.py score``: what a verifier says of images that are there already."""

from rflow_jax.score.command import score
from rflow_jax.score.config import ScoreConfig

__all__ = ["ScoreConfig", "score"]
