"""Where a compiled program's time goes on a GPU: its kernels by kind and by name, and the epilogues of its products."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# The first kind whose expression is found in a kernel's name.
KINDS = {
    "attention": r"cudnn_generated|flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|cublas|splitK|_s\d+_tensor",
    "concatenations": r"concatenate",
    "updates in place": r"dynamic_update_slice|scatter",
    "copies": r"[Mm]emcpy|[Mm]emset|copy|transpose|wrapped_slice",
    "reductions": r"reduce|softmax",
    "other element-wise": r"",
}


def print_kernels(run: Callable[[], None], steps: int, most: int = 25) -> None:
    """Profiles one call of ``run``, which takes so many steps; prints milliseconds a step by kind, and the longest."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    totals: dict[str, list[float]] = {}
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                name = re.sub(r"_\d+$", "", event.name)
                totals.setdefault(name, []).append(event.duration_ns / 1e6)
    kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name, times in totals.items():
        kinds[next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))] += times
    print(f"kernels: {sum(map(sum, totals.values())) / steps:.1f} ms a step")
    for name, times in [*kinds.items(), *sorted(totals.items(), key=lambda item: -sum(item[1]))[:most]]:
        print(f"{sum(times) / steps:8.2f} ms {len(times) // steps:5d} x  {name[:110]}")


def epilogues(compiled: Any) -> str:
    """How often each library's kernel, with which epilogue, and each kind of unfused operation is in a program."""
    text = compiled.as_text()
    found = Counter(re.findall(r'custom_call_target="([\w$]*(?:cublas|cudnn)[\w$]*)"', text))
    found |= Counter(f"epilogue {name}" for name in re.findall(r'"epilogue":"(\w+)"', text))
    found |= Counter(re.findall(r'"kind":"(__\w+)"', text))
    found["concatenate"] = len(re.findall(r" concatenate\(", text))
    return ", ".join(f"{count} x {name}" for name, count in found.most_common())
