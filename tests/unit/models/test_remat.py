"""What the backward pass computes again."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rflow_jax.models.attention import attend
from rflow_jax.models.stack import apply_remat


# Traced only: nothing here runs on a GPU.
@pytest.mark.parametrize(
    ("remat", "forward", "products"),
    [("none", 1, 4), ("dots_and_attention", 1, 4), ("dots", 2, 4), ("full", 2, 5)],
)
def test_attention_kernels_run_once_if_their_results_are_kept(monkeypatch, remat, forward, products):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    kernel = jnp.ones((64, 64), jnp.bfloat16)

    def block(x):
        q = (x @ kernel).reshape(1, 8, 1, 64)
        return attend(q, q, q, impl="cudnn").reshape(1, 8, 64) @ kernel

    def loss(x):
        return jnp.sum(jnp.square(apply_remat(block, remat)(x)))

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 8, 64), jnp.bfloat16)))
    assert text.count("dot_product_attention_fwd_wrapper") == forward
    assert text.count("dot_product_attention_bwd_wrapper") == 1
    assert text.count("dot_general[") == products
