"""Settings of the whole test run. Read before any test imports JAX."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Eight fake devices: the same number whatever the machine, so that sharding is tested everywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# Where few cores stand for eight devices some come late to a collective; after 40 s XLA would end the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # A program of a test is compiled for longer than it runs.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# XLA then compiles for CPUs in half the time; 0.11 has no such flags.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# What one test compiled serves the others of this run, and none of a later run. Workers inherit the first one's folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rflow_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test must not reach for the network

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in the package's annotations are checked at every call of a test, in the modules that have any.
ROOT = Path(__file__).parents[1]
ANNOTATED = [file for file in ROOT.glob("rflow_jax/**/*.py") if "from rflow_jax.typing import" in file.read_text()]
install_import_hook([".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ANNOTATED], "beartype.beartype")

# The first example of a shape compiles, and takes as long as that takes.
hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.load_profile("default")

REQUIRE_PARITY = os.environ.get("RFLOW_REQUIRE_PARITY") == "1"
PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recordings."""
    return Path(__file__).parent / "golden"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/parity is marked, before ``-m`` chooses: a forgotten mark must not hide a test."""
    for item in items:
        if item.path.is_relative_to(PARITY):
            item.add_marker(pytest.mark.parity)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not search it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A parity file that skips itself whole (importorskip) fails where parity is required."""
    report = yield
    if REQUIRE_PARITY and report.outcome == "skipped" and collector.path.is_relative_to(PARITY):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A skipped parity test fails where parity is required."""
    report = yield
    if REQUIRE_PARITY and report.outcome == "skipped" and item.get_closest_marker("parity"):
        _fail(report)
    return report


def _fail(report: pytest.CollectReport | pytest.TestReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"RFLOW_REQUIRE_PARITY=1, but skipped: {reason}"
