"""The numbers of a run while it goes: lines on standard error, a JSON lines file, TensorBoard and wandb."""

from __future__ import annotations

import importlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from rflow_jax.errors import InputError
from rflow_jax.parallel.distributed import allgather_strings
from rflow_jax.training.config import LoggingConfig
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.files import LARGEST_JOURNAL, read_bytes, read_text
from rflow_jax.utils.json_files import parse_json_line

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"
SKIPPED_SHOWN = 10  # records named one by one; all are counted

# Dense bfloat16 TFLOP/s per chip by a prefix of JAX's device_kind, from vendors' data sheets. The longest prefix wins.
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def peak_flops(config: LoggingConfig, dtype: str) -> float | None:
    """Peak FLOP/s of all devices together; None if not known, as for float32."""
    tflops = config.peak_tflops
    if tflops is None and dtype == "bfloat16":
        tflops = known_tflops(jax.devices()[0].device_kind)
    return tflops * 1e12 * jax.device_count() if tflops else None


def known_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device by its name; None for an unknown one."""
    prefix = max(filter(device_kind.startswith, PEAK_TFLOPS), key=len, default=None)
    return None if prefix is None else float(PEAK_TFLOPS[prefix])


class MetricWriter:
    """Writes the metrics of each step, and now and then a line on standard error; only the first process writes.

    Args:
        batch_size: samples of a step, of all processes.
        flops: of one sample in the network that is trained, forward and backward, without recomputation and without
            the encoders of the corrector (VAE, T5, CLIP).
        resumed: the step that the run continues from: later lines of an earlier try are dropped.
        dtype: of the activations; only bfloat16's peak is known by the device's name.
    """

    def __init__(
        self,
        out: Path,
        config: LoggingConfig,
        *,
        steps: int,
        batch_size: int,
        flops: float,
        resumed: int,
        dtype: str = "bfloat16",
    ):
        self.config, self.steps, self.flops, self.batch_size = config, steps, flops, batch_size
        self.writes = jax.process_index() == 0
        self._peak = peak_flops(config, dtype)
        self._console = Console(stderr=True, soft_wrap=True)
        self._file = out / METRICS
        self._skipped = 0
        self._losses: list[float] = []
        self._names: list[str] = []
        self.restart_clock()
        self._board = self._wandb = None
        self._tried: set[int] = set()
        if not self.writes:
            return
        self._tried = _keep_until(self._file, resumed)
        if config.tensorboard:
            # TensorBoard leaves out what an earlier try wrote from that step on.
            writer = importlib.import_module("tensorboardX").SummaryWriter
            self._board = writer(str(out / "tensorboard"), purge_step=resumed + 1)
        if config.wandb:
            try:
                self._wandb = importlib.import_module("wandb")
            except ImportError as error:
                raise InputError("logging.wandb: the package is not installed: pip install wandb") from error
            id_file = out / WANDB_ID  # a resumed run continues the same run of wandb
            if not id_file.exists():
                write_file(id_file, uuid.uuid4().hex)
            name = read_text(id_file, "name of the run").strip()
            self._wandb.init(project=config.wandb, dir=str(out), resume="allow", id=name)

    def step(
        self, step: int, report: Any, batch: Any, drawn: Mapping[str, int], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Records a finished step; all processes must call it, in the same order.

        Args:
            report: the step's numbers, on the host.
            batch: the host's batch.
            drawn: samples of each subset so far, of all processes.
            metrics: further numbers of the step.
        """
        self._samples += self.batch_size
        self._waited += batch.waited
        self._losses.append(float(report.loss))
        # Every process reads records of its own, so each names them on its standard error.
        source = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        for reason in batch.skipped[: max(0, SKIPPED_SHOWN - self._skipped)]:
            self._print(f"{source}skipped {reason}")
        self._skipped += len(batch.skipped)
        line: dict[str, Any] = {"step": step, "loss": float(report.loss), "gradient_norm": float(report.gradient_norm)}
        line |= {} if report.d is None else {"d": float(report.d)}
        line |= {**(metrics or {}), "drawn": dict(drawn), "samples": batch.digest}
        self._names = list(metrics or {})
        if step % self.config.every == 0 or step == self.steps:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            line |= {"samples_per_s": self._samples / seconds, "data_wait": self._waited / seconds}
            if self._peak:
                line["mfu"] = self.flops * self._samples / seconds / self._peak
            line["skipped"] = _sum_over_processes(self._skipped)
            self._show(line)
            self.restart_clock()
            self._losses = []
        self.write(line)

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Records the metrics on held-out records; the time it took does not count as training."""
        self.write({"step": step, **losses})
        numbers = ", ".join(f"{name.rpartition('/')[2]} {loss:.4f}" for name, loss in losses.items())
        self.info(f"step {step}/{self.steps}, validation: {numbers}")
        self.restart_clock()

    def was_validated(self, step: int) -> bool:
        """Whether an earlier start has validated this step's parameters; all processes must call it."""
        return allgather_strings("yes" if step in self._tried else "no")[0] == "yes"

    def write(self, line: dict[str, Any]) -> None:
        """Writes the numbers of one step to the file, TensorBoard and wandb."""
        if not self.writes:
            return
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        numbers |= {f"drawn/{name}": count for name, count in line.get("drawn", {}).items()}
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, line["step"])
        if self._wandb:
            self._wandb.log(numbers, step=line["step"])

    def restart_clock(self) -> None:
        """Leaves the time until now (compiling, validation) out of the training time."""
        self._samples, self._waited, self._since = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside (saving) out of the training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin

    def info(self, text: str) -> None:
        """Prints a line on the first process's standard error."""
        if self.writes:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _show(self, line: dict[str, Any]) -> None:
        loss = sum(self._losses) / len(self._losses)
        parts = [f"step {line['step']}/{self.steps}", f"loss {loss:.4f}", f"|g| {line['gradient_norm']:.3g}"]
        parts += [f"d {line['d']:.3g}"] if "d" in line else []
        parts += [f"{name} {line[name]:.3f}" for name in self._names]
        parts += [f"{line['samples_per_s']:.2f} samples/s"]
        parts += [f"MFU {line['mfu']:.1%}"] if "mfu" in line else []
        parts += [f"data wait {line['data_wait']:.0%}", " ".join(f"{k} {v}" for k, v in line["drawn"].items())]
        parts += [f"{line['skipped']} skipped"] if line["skipped"] else []
        self.info(", ".join(parts))


def _sum_over_processes(count: int) -> int:
    """The sum over all processes, each of which must call this."""
    if jax.process_count() == 1:
        return count
    return int(np.sum(multihost_utils.process_allgather(np.asarray(count, np.int32))))


def _keep_until(file: Path, step: int) -> set[int]:
    """Drops lines after ``step``, and a truncated one; returns the steps that were validated."""
    if not file.exists():
        return set()
    kept, tried = [], set()
    for text in read_bytes(file, "metrics", LARGEST_JOURNAL).split(b"\n"):
        try:
            line = parse_json_line(text, str(file), nan=True)
        except InputError:
            continue
        if isinstance(at := line.get("step", 0), int) and at <= step:
            kept.append(text + b"\n")
            tried |= set() if "loss" in line else {at}
    write_file(file, b"".join(kept))
    return tried
