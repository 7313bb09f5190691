"""What every test stands on: the backends that run here, poisoned memory, a fixed seed."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

# Before torch is imported, and for every process that a test starts: workers share the cores. Two pools of threads on
# two cores wait for each other more than they compute.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Before anything imports the hub's client. No test asks a hub: where none answers, each model that is not there would
# be asked for over and over, 47 s until its one line comes (2 cores, 2026-11-26).
os.environ["HF_HUB_OFFLINE"] = "1"

import cases
import played
import pytest
import torch

# cuBLAS multiplies the same way on every run only with a workspace that is settled before its first call; torch raises
# under deterministic algorithms without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton reads this when it is imported, so it is settled here, before anything can: without a GPU its kernels are
# played by the interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter

from wrpo_kernels import token_logp
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.dispatch.backends import load_extension

# Backend and the device it is tested on. The same test files run on all of them.
PLACES = (
    ("native", "cpu"),
    ("reference", "cpu"),
    ("triton", "cpu"),
    ("reference", "cuda"),
    ("triton", "cuda"),
    ("cuda", "cuda"),
)
# The kernel bodies of the CUDA backend played on the host: for test files that say so, `PLACES = HERE + (PLAYED,)`.
PLAYED = ("cuda", "cpu")
HERE = tuple(place for place in PLACES if place[1] == "cpu" or torch.cuda.is_available())


@cache
def refusal(backend: str, device: str) -> str | None:
    """Why a backend cannot run here, in its own words; None when it can."""
    if (backend, device) == ("triton", "cpu") and not triton_backend.missing():
        interpreter.compute_like_a_gpu()
    try:
        token_logp(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def pytest_configure(config: pytest.Config) -> None:
    # NumPy warns of NaN and infinities that a GPU computes without a word.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


# Of the files below only these run interpreted, in bfloat16: the Triton kernels have their own files, and what is left
# to prove is that the driver hands them the right rows. On a GPU all of them run.
INTERPRETED = {
    "test_linear_token_logp": (
        "test_the_transform_of_the_logits_is_applied_in_the_order_of_the_models",
        "test_each_gradient_alone_is_as_good_as_plain_torch",
        "test_what_stands_in_ignored_positions_reaches_nothing",
    ),
    "test_adapter": ("test_each_gradient_alone_is_as_good_as_plain_torch",),
    "test_linear_token_statistics": (
        "test_a_loss_of_all_statistics_has_the_gradients_of_plain_torch_in_16_bits",
        "test_its_log_probs_are_those_of_the_other_op_bit_for_bit",
        "test_log_probs_of_chosen_ids_are_those_of_whole_logits_with_their_gradients",
    ),
    "test_float32_logits": (
        "test_log_probs_are_right_to_1e_4_and_gradients_nearer_than_with_rounded_logits",
        "test_statistics_are_right_to_1e_4_and_their_gradients_nearer",
    ),
    "test_linear_preference_loss": ("test_logp_is_the_sum_of_token_log_probs",),
    "test_linear_preference_layout": (),
    "test_linear_preference_graph": (),
    "test_linear_preference_cost": (),
    "test_linear_preference_errors": (),
    "test_linear_preference_large_group": (),
    "test_likelihood": (),
    "test_pairwise_losses": (),
    "test_wrpo_loss": (),
    "test_column_filter": (),
    "test_compile": ("test_autocast_changes_nothing",),
}
# Rows of a real vocabulary take a second each, interpreted: they take turns with the types.
LARGE = [case for case in cases.SHAPES.values() if case.vocabulary >= 32000]
TYPE_OF_LARGE = dict(zip(LARGE, itertools.cycle(cases.DTYPES)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_too_slow_interpreted(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = longest_first([item for item in items if item not in set(left_out)])


def is_too_slow_interpreted(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("place") != ("triton", "cpu"):
        return False
    dtype, case = parameters.get("dtype", torch.bfloat16), parameters.get("case")
    if item.path.stem not in INTERPRETED:
        return dtype != TYPE_OF_LARGE.get(case, dtype)
    return item.originalname not in INTERPRETED[item.path.stem] or dtype != torch.bfloat16


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """By file: those with a slow test, then those with most tests. A worker that takes a long file last has the other
    wait for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    return sorted(items, key=lambda item: (item.path not in slow, -count[item.path], item.path))


def what_is_here_stays() -> None:
    """A collection of garbage, of which accelerate asks for one after each training, no longer walks over it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    what_is_here_stays()


@pytest.fixture(scope="module", autouse=True)
def what_a_file_imported_and_compiled_stays():
    yield
    what_is_here_stays()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries that count their objects at the end of the process call them lost


def pytest_report_header() -> list[str]:
    lines = []
    for backend, device in PLACES:
        reason = refusal(backend, device) if (backend, device) in HERE else "torch sees no CUDA device"
        lines.append(f"wrpo_kernels {backend} on {device}: " + (f"not tested, {reason}" if reason else "tested"))
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        places = getattr(metafunc.module, "PLACES", HERE)
        marked = [pytest.param(place, marks=pytest.mark.gpu if place[1] == "cuda" else ()) for place in places]
        metafunc.parametrize("place", marked, indirect=True, ids=["-".join(place) for place in places])


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    if request.param == PLAYED:
        played.use(request.getfixturevalue("played_module"), request.getfixturevalue("monkeypatch"))
    reason = refusal(*request.param)
    if reason:
        pytest.skip(f"backend {request.param[0]!r} does not run here: {reason}")
    return request.param


@pytest.fixture(scope="session")
def played_module() -> ModuleType:
    return played.module()


@pytest.fixture
def backend(place: tuple[str, str]) -> str:
    return place[0]


@pytest.fixture
def device(place: tuple[str, str]) -> torch.device:
    return torch.device(place[1])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN (the largest integer for int types), so an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@contextmanager
def own_log() -> Iterator[None]:
    """A command sends the log to stderr and away from `caplog`: for its own test, whichever comes next."""
    log = logging.getLogger("wrpo")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = handlers, level, propagate


@pytest.fixture(autouse=True)
def log_as_it_was():
    with own_log():
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(20241204)
    else:  # the other way formats the stack for devices that are not there: 1 ms a test
        torch.default_generator.manual_seed(20241204)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Every picture that the test draws, as a figure laid out, instead of a file."""
    from matplotlib.figure import Figure

    figures = []

    def save(figure: Figure, path: object) -> None:
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


@pytest.fixture(autouse=True)
def chosen_instruction_set():
    """Every test starts and ends at the instruction set that the native module chose."""
    module, _ = load_extension("_cpu")
    chosen = module and module.features()["simd"]
    yield
    if module:
        module.set_simd(chosen)
