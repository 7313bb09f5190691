"""Peak memory of one step: of a process of its own on the CPU, of the allocator on a GPU.

The figure is MiB above inputs, outputs and gradients: what a contestant needs besides what all of them have. On the CPU
it is the growth of the resident size, so every measurement has a fresh process: one that earlier steps left with free
but resident memory would show less. The process may not take more than the machine has; a step that needs more ends
with a reason, and the machine goes on.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil
import torch

from benchmarks.suite.problem import Problem, Rival, Setting
from benchmarks.suite.timing import step_of

MIB = 1 << 20
GOODBYE = 5.0  # seconds that a process may take to end after its answer


class Unaffordable(Exception):
    """Why a step could not be measured: more memory or time than there is."""


def peak_of(setting: Setting, rival: Rival, device: str, problem: Problem | None, patience: float) -> float:
    """MiB of one step at its peak. `problem` is used on a GPU, where no fresh process is needed.

    Raises:
        Unaffordable: the step needs more memory than the machine has, or more seconds than `patience`.
    """
    if device != "cpu":
        return _peak_of_allocator(problem, rival)
    # Forked from a server that has imported everything and computed nothing: fresh, and started in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.suite.contestants"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, setting, rival.name, torch.get_num_threads()), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        if not ours.poll(patience):
            raise Unaffordable(f"a step takes more than {patience:.0f} s")
        answer = ours.recv()
        process.join(GOODBYE)  # killed, it would leak the semaphores of its compilers
    except EOFError:
        raise Unaffordable("its process was killed, most likely for its memory") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(pipe: Connection, *arguments) -> None:
    try:
        pipe.send(measured_peak(*arguments))
    except Exception as error:
        pipe.send(error if isinstance(error, Unaffordable) else RuntimeError(f"{type(error).__name__}: {error}"))


def peak_above_now(call: Callable[[], object]) -> int:
    """Bytes by which the resident size of this process rises at most while `call` runs (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def measured_peak(setting: Setting, name: str, threads: int) -> float:
    """In a fresh process: the peak of `name`, after a small problem that starts thread pools and compilers."""
    from benchmarks.suite.contestants import CONTESTANTS

    rival = CONTESTANTS[name]
    torch.set_num_threads(threads)
    small = Problem(setting._replace(vocabulary=512, response=8, prompt=min(8, setting.prompt)))
    step_of(small, rival.loss(small))()
    problem = Problem(setting)
    step = step_of(problem, rival.loss(problem))
    _limit_memory()
    try:
        peak = peak_above_now(step)
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise Unaffordable(f"more memory than the {available() / 2**30:.0f} GiB that are free") from None
    return (peak - gradient_bytes(problem)) / MIB


def gradient_bytes(problem: Problem) -> int:
    return sum(leaf.grad.nbytes for leaf in problem.leaves().values() if leaf.grad is not None)


def available() -> int:
    """Bytes that a process could still take without driving others out."""
    return psutil.virtual_memory().available


def _limit_memory() -> None:
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(0.9 * available()), resource.RLIM_INFINITY))


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error)


def _peak_of_allocator(problem: Problem, rival: Rival) -> float:
    step = step_of(problem, rival.loss(problem))
    try:
        step()  # compiles, and fills caches that are not the step's own
        problem.forget_gradients()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before - gradient_bytes(problem)
    except torch.cuda.OutOfMemoryError:
        problem.forget_gradients()
        torch.cuda.empty_cache()
        raise Unaffordable("more memory than the device has") from None
    return peak / MIB


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
