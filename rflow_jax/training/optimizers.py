"""optax optimizers behind a clip of the gradients' global norm."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rflow_jax.errors import InputError
from rflow_jax.training.config import OptimizerConfig
from rflow_jax.typing import Array, Float


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by the number of steps taken."""
    lr, warmup = config.lr, config.warmup_steps
    begin = warmup if config.decay_start is None else config.decay_start
    if config.schedule == "constant":
        after = optax.constant_schedule(lr)
    elif config.schedule == "linear":
        after = optax.linear_schedule(lr, 0.0, (config.decay_steps or 0) - begin, begin - warmup)
    else:
        after = optax.cosine_decay_schedule(lr, (config.decay_steps or 0) - begin)
        if begin > warmup:
            after = optax.join_schedules([optax.constant_schedule(lr), after], [begin - warmup])
    if not warmup:
        return after
    # Starts above zero, so that the first step is not wasted.
    return optax.join_schedules([optax.linear_schedule(lr / warmup, lr, warmup - 1), after], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer, after a clip of the gradients."""
    if config.name == "sgd":
        inner = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(learning_rate(config)))
    elif config.name == "adamw":
        b1, b2 = config.betas
        inner = optax.adamw(learning_rate(config), b1=b1, b2=b2, eps=config.eps, weight_decay=config.weight_decay)
    elif config.name == "muon":
        inner = muon(config)
    else:
        inner = prodigy(config)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), inner)


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Muon for the matrices that the configuration names, and Adam for all else."""
    b1, b2 = config.betas

    def dimensions(params: Any) -> Any:
        def of(path: Any, leaf: Array) -> Any:
            # A variable of nnx adds an entry of its own to the path of its value.
            names = (str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
            chosen = leaf.ndim == 2 and re.fullmatch(config.muon_parameters, ".".join(names))
            return optax.contrib.MuonDimensionNumbers() if chosen else None

        found = jax.tree_util.tree_map_with_path(of, params)
        # optax asks about a tree without leaves, too.
        if jax.tree.leaves(params) and not jax.tree.leaves(
            found, is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
        ):
            raise InputError(f"optimizer.muon_parameters is {config.muon_parameters!r}: no matrix is called so")
        return found

    return optax.contrib.muon(
        learning_rate(config),
        beta=config.momentum,
        weight_decay=config.weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=learning_rate(replace(config, lr=config.adam_lr or config.lr)),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,  # the size of AdamW's steps: arXiv 2502.16982
    )


def prodigy(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Prodigy (which always corrects the bias of its averages), with the weight decay as a step of its own.

    The first steps are smaller than the last bits of the parameters, so the order of rounding shows: as in PyTorch,
    the decayed parameter is rounded before the step is added. In one sum, a decay that would be rounded away adds to
    every step.
    """
    rate = learning_rate(config)
    inner = optax.contrib.prodigy(
        rate,
        betas=config.betas,
        eps=config.eps,
        estim_lr0=config.d0,
        estim_lr_coef=config.d_coef,
        safeguard_warmup=config.safeguard_warmup,
    )

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        beta1, beta2 = config.betas
        taken = state.count + 1
        correction = (1 - beta2**taken) ** 0.5 / (1 - beta1**taken)
        decay = config.weight_decay * rate(state.count) * state.estim_lr * correction
        steps, state = inner.update(updates, state, params)

        def change(p: Array, step: Array) -> Array:
            return (p - decay * p) + step - p

        return jax.tree.map(change, params, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


class ProdigyNumbers(NamedTuple):
    """Prodigy's estimate of its step size, in the names of the ``prodigyopt`` package."""

    d: Float[Array, ""]
    d_max: Float[Array, ""]
    d_numerator: Float[Array, ""]
    d_denom: Float[Array, ""]
    d_hat: Float[Array, ""]


def prodigy_numbers(state: Any, d_coef: float = 1.0) -> ProdigyNumbers | None:
    """Prodigy's numbers in an optimizer's state; None for another optimizer."""
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_prodigy) if _is_prodigy(leaf)]
    if not found:
        return None
    (prodigy,) = found
    denominator = jnp.asarray(optax.tree.sum(jax.tree.map(lambda s: jnp.sum(jnp.abs(s)), prodigy.grad_sum)))
    d, numerator = prodigy.estim_lr, prodigy.numerator_weighted
    # d never falls, so it is also the greatest guess so far.
    return ProdigyNumbers(d, d, numerator, denominator, d_coef * numerator / denominator)


def _is_prodigy(state: Any) -> bool:
    return isinstance(state, optax.contrib.ProdigyState)
