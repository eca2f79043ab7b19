"""What processes that tests start are given."""

from __future__ import annotations

import os


def xla_flags(devices: int = 1) -> str:
    """``XLA_FLAGS`` of a process with this number of CPU devices; it compiles as quickly as this one."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
