"""Large memory that is new to a call of a CPU lies in huge pages, where Linux gives them to those who ask."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from wrpo_kernels import linear_nll_loss, linear_preference_loss, linear_token_logp, token_logp
from wrpo_kernels.dispatch import huge_pages
from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.dispatch.huge_pages import LEAST_BYTES, in_huge_pages
from wrpo_kernels.lm_head import scaling
from wrpo_kernels.lm_head.budget import logits_buffer

_cpu, _reason = load_extension("_cpu")
MIB, PAGE = 1 << 20, mmap.PAGESIZE
V, D, N = 40960, 256, 8  # a float32 dW of 40 MiB, which malloc maps anew at each call
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def asks() -> None:
    """Skips where nobody gives what is asked for; memory is not written before it is asked for."""
    if _cpu is None:
        pytest.skip(_reason)
    if not SETTING.exists() or not {"[madvise]", "[always]"} & set(SETTING.read_text().split()):
        pytest.skip("this system gives no transparent huge pages")
    torch.use_deterministic_algorithms(False)


class Mapping(NamedTuple):
    first: int
    last: int
    has_asked: bool
    huge_bytes: int


def mappings() -> Iterator[Mapping]:
    """Of this process."""
    first = last = huge = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
        elif name == "AnonHugePages:":
            huge = int(values[0]) << 10
        elif name == "VmFlags:":
            yield Mapping(first, last, "hg" in values, huge)


def bytes_that_asked(start: int, size: int) -> int:
    """How many bytes of [start, start + size) asked for huge pages."""
    return sum(max(0, min(some.last, start + size) - max(some.first, start)) for some in mappings() if some.has_asked)


def has_asked(tensor: Tensor) -> bool:
    return bytes_that_asked(tensor.data_ptr(), tensor.nbytes) > tensor.nbytes - 2 * PAGE


def huge_bytes_of(start: int, size: int) -> int:
    """In huge pages, of the mappings that [start, start + size) touches."""
    return sum(some.huge_bytes for some in mappings() if some.first < start + size and start < some.last)


def gives_huge_pages(size: int) -> bool:
    """Whether memory that asks by itself is given one: the system may have none free, or may have been told not to."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(size))
        buffer = ctypes.c_char.from_buffer(memory)
        given = huge_bytes_of(ctypes.addressof(buffer), size)
        del buffer
    return given > 0


def test_new_memory_asks_for_huge_pages_and_gets_them_where_they_are_given(asks):
    size = 64 * MIB
    before = gives_huge_pages(size)
    tensor = in_huge_pages(torch.empty(size, dtype=torch.uint8)).fill_(1)
    assert has_asked(tensor)
    assert huge_bytes_of(tensor.data_ptr(), size) > 0 or not (before and gives_huge_pages(size))


def test_only_whole_pages_of_the_memory_are_asked_for(asks):
    with mmap.mmap(-1, 8 * PAGE) as memory:
        buffer = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(buffer)
        assert _cpu.advise_huge_pages(start + 2 * PAGE + 1, 4 * PAGE)
        assert bytes_that_asked(start, 8 * PAGE) == bytes_that_asked(start + 3 * PAGE, 3 * PAGE) == 3 * PAGE
        assert not _cpu.advise_huge_pages(start + 6 * PAGE + 1, 2 * PAGE - 2)
        assert bytes_that_asked(start, 8 * PAGE) == 3 * PAGE
        del buffer


def test_memory_that_cannot_be_asked_for_is_no_error():
    if _cpu is None:
        pytest.skip(_reason)
    for start, size in ((0, 0), (1, 3), (PAGE, -PAGE), (PAGE, 16 * PAGE)):  # the last one is mapped by nobody
        assert not _cpu.advise_huge_pages(start, size)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(2, N // 2, D), torch.randn(V, D) / 16
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (2, N // 2))


PAIR = {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.zeros(2, dtype=torch.int64), "beta": 0.1}
LOSSES = {
    "log-probs, deltas kept": lambda h, w, y: linear_token_logp(h, w, y).sum(),
    "a pair in pieces": lambda h, w, y: linear_preference_loss(h, w, y, budget_bytes=3 * V * 4, **PAIR).loss,
    "likelihood in pieces": lambda h, w, y: linear_nll_loss(h, w, y, budget_bytes=3 * V * 4).loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_head_lies_in_huge_pages(name, asks):
    hidden, weight, labels = operands()
    (grad,) = torch.autograd.grad(LOSSES[name](hidden, weight, labels), weight)
    assert has_asked(grad)


def test_the_gradient_of_many_hidden_states_of_a_small_head_lies_in_huge_pages(asks):
    hidden, weight = torch.randn(2, 20 * MIB // D // 4, D), torch.randn(64, D) / 16
    labels = torch.randint(0, len(weight), hidden.shape[:-1])
    (grad,) = torch.autograd.grad(linear_preference_loss(hidden.requires_grad_(), weight, labels, **PAIR).loss, hidden)
    assert has_asked(grad)


def test_logits_and_their_gradient_and_what_a_backward_makes_lie_in_huge_pages(asks):
    buffer = logits_buffer(torch.empty(0), 40 * MIB // (4 * V), V)
    assert has_asked(buffer)
    assert has_asked(scaling.scaled(buffer, torch.tensor(0.5), torch.float32))
    logits = torch.randn(40 * MIB // (4 * V), V, requires_grad=True)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    (grad,) = torch.autograd.grad(token_logp(logits, labels).sum(), logits)
    assert has_asked(grad)


def test_what_has_no_memory_of_its_own_or_little_is_left_alone(monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr(huge_pages, "load_extension", refuse)
    size = 2 * LEAST_BYTES
    for tensor in (torch.empty(0), torch.empty(LEAST_BYTES - 1, dtype=torch.uint8), torch.empty(size, device="meta")):
        assert in_huge_pages(tensor) is tensor
    with FakeTensorMode():
        in_huge_pages(torch.empty(size, dtype=torch.uint8))
    one = torch.zeros(1)
    make_fx(lambda x: in_huge_pages(x.new_empty(size)), tracing_mode="symbolic")(one)
    torch.vmap(lambda x: in_huge_pages(x.expand(size)))(torch.zeros(2, 1))
    with pytest.raises(AssertionError, match="asked for"):
        in_huge_pages(torch.empty(LEAST_BYTES, dtype=torch.uint8))
