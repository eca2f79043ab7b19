"""XLA's flags for programs that run beside each other."""

import os
import subprocess
import sys

import pytest

from rflow_jax.parallel.xla_flags import disable_cuda_graphs

OFF = "--xla_gpu_enable_command_buffer="


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """JAX's plugin for CUDA, or a folder of its name."""
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", OFF),
        ("--xla_gpu_autotune_level=0", f"--xla_gpu_autotune_level=0 {OFF}"),
        (OFF, OFF),
        (f"{OFF}FUSION,CUBLAS", f"{OFF}FUSION,CUBLAS"),
    ],
)
def test_graphs_are_off_unless_the_user_says_otherwise(before, after, cuda, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    disable_cuda_graphs()
    disable_cuda_graphs()
    assert os.environ["XLA_FLAGS"] == after


def test_without_cuda_nothing_changes(monkeypatch):
    monkeypatch.setattr("rflow_jax.parallel.xla_flags._has_cuda", lambda: False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    disable_cuda_graphs()
    assert "XLA_FLAGS" not in os.environ


def test_xla_knows_the_flag():
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": OFF, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"2\n"), done.stderr
