"""A function run in two processes that talk over gloo, and accelerate's FSDP on their CPUs."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def run_in_two_processes(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns in each, where each is one core; `work` is a function of a module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(work, folder, port), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, work: Callable[[int, Path], Any], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported, as in tests/conftest.py
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, CUDA_VISIBLE_DEVICES="")
    torch.save(work(rank, folder), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. What Python and torch take down at an ordinary exit has aborted such a process after its work: a
    # thread of C++ that nobody had joined (torch 2.13, seen once).
    os._exit(0)


def allow_fsdp_on_cpus() -> None:
    """accelerate takes an FSDP plugin on accelerators alone; what it would do there it does here too."""
    plain = AcceleratorState.__init__

    def start(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        is_first = not AcceleratorState._shared_state
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if is_first and fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start
