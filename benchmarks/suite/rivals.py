"""What people run instead of the fused loss, each from its own package and at its best documented settings.

`RIVALS` names them all. One that is not installed, or has no form of a problem on its device, says so in `why_not`.
Rivals that end at the log-prob of each token are composed into the loss from their `reduction="none"`, and those that
can leave out rows that do not count are given only rows that do. What compiles, compiles at the first call of a loss:
that call's time, less that of a later one, is the price of a new shape.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite.problem import IGNORED, Problem, Rival, Setting
from wrpo_kernels.lm_head.budget import check_budget

Loss = Callable[[], Tensor]
TokenNLL = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], target [N] -> [N]
WhyNot = Callable[[Problem], "str | None"]
PACKAGES = {  # as pip calls what has a module
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}


def full_logits(problem: Problem) -> Tensor:
    """[S, T, V] in the dtype of the head."""
    logits, adapter = F.linear(problem.hidden, problem.weight), problem.low_rank()
    if adapter is not None:
        logits = logits + F.linear(*adapter)  # as PEFT does
    if problem.logit_scale != 1.0:
        logits = logits * problem.logit_scale
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return logits


def plain(problem: Problem) -> Loss:
    """As the paper's released code writes it: full logits in float32, log_softmax and gather over padded rows."""
    counts = problem.labels != IGNORED
    target = problem.labels.where(counts, 0)[..., None]

    def loss() -> Tensor:
        token_logp = full_logits(problem).float().log_softmax(-1).gather(-1, target)[..., 0]
        reward = problem.beta * ((token_logp * counts).sum(-1) - problem.ref_logp)
        margin = (problem.seq_weight * reward).view(-1, problem.num_groups).sum(0)  # all first responses come first
        return -F.logsigmoid(margin).mean()

    return loss


def compiled_plain(problem: Problem) -> Loss:
    forget_compiled()
    return torch.compile(plain(problem), dynamic=False)


def forget_compiled() -> None:
    """So that each problem is compiled for its own shapes; torch gives up on a function after eight of them."""
    torch.compiler.reset()


def scaled_operands(problem: Problem) -> tuple[Tensor, Tensor]:
    """s (h W^T) = (s h) W^T, for rivals that know no scale of the logits."""
    hidden, weight = problem.operands()
    return (hidden if problem.logit_scale == 1.0 else hidden * problem.logit_scale), weight


def of_counted_rows(token_nll: TokenNLL, problem: Problem) -> Loss:
    """The loss from the negative log-likelihoods of the rows that count, summed over each response.

    Along rows, where torch adds in pairs: `index_add`, one after the other, puts the loss off by 2e-4 at 4096 tokens.
    """
    counts = problem.labels != IGNORED
    target, zeros = problem.labels[counts], torch.zeros(counts.shape, device=problem.device)

    def loss() -> Tensor:
        hidden, weight = scaled_operands(problem)
        nll = token_nll(hidden[counts], weight, target)
        return problem.loss_of(-zeros.masked_scatter(counts, nll.float()).sum(-1))

    return loss


def trl_selective(problem: Problem) -> Loss:
    """TRL's `selective_log_softmax` of full logits; 16-bit logits stay 16-bit there."""
    selective_log_softmax = import_module("trl.trainer.utils").selective_log_softmax
    counts = problem.labels != IGNORED
    target = problem.labels.where(counts, 0)

    def loss() -> Tensor:
        token_logp = selective_log_softmax(full_logits(problem), target, row_mask=counts)
        return problem.loss_of(token_logp.float().sum(-1))

    return loss


def trl_fused_head(problem: Problem) -> Loss:
    """The head that TRL's own trainers run, with their tile of 32768 columns."""
    token_logp = import_module("trl.kernels").ChunkedLogProbFunction.apply

    def nll(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        temperature, tile, bias, scale = 1.0, 32768, None, 1.0
        options = (temperature, tile, problem.softcap, scale, ("log_probs",))
        return -token_logp(rows, weight, bias, target, *options)[0]

    return of_counted_rows(nll, problem)


def liger_dpo(problem: Problem, *, compiled: bool) -> Loss:
    """A pair at a time, its default. It runs its own reference or none: here none, where the reference cancels."""
    if compiled:
        forget_compiled()
    pairs = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        ignore_index=IGNORED, beta=problem.beta, use_ref_model=False, compiled=compiled
    )

    def loss() -> Tensor:
        hidden, weight = scaled_operands(problem)
        return pairs(weight, hidden, problem.labels)[0]

    return loss


def liger_cross_entropy(problem: Problem) -> Loss:
    """Weight gradients accumulated in float32, as its documentation advises for 16-bit heads."""
    cross_entropy = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    options = {"softcap": problem.softcap, "reduction": "none", "accum_dtype": torch.float32}
    return of_counted_rows(lambda *operands: cross_entropy(*operands, **options), problem)


def cut_cross_entropy(problem: Problem) -> Loss:
    """Its compiled form on the CPU and its kernels on a GPU; it leaves out ignored rows itself."""
    cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    forget_compiled()
    impl = "cce" if problem.device.type == "cuda" else "torch_compile"
    counts = problem.labels != IGNORED
    options = {"ignore_index": IGNORED, "softcap": problem.softcap, "reduction": "none", "impl": impl}

    def loss() -> Tensor:
        hidden, weight = scaled_operands(problem)
        nll = cross_entropy(hidden, weight, problem.labels, **options)
        # Its kernels refuse the expanded gradient that a bare sum would hand back to them.
        return problem.loss_of(-nll.float().where(counts, 0.0).sum(-1))

    return loss


def torch_linear_ce(problem: Problem, *, chunks: str) -> Loss:
    """`torch.nn.functional.linear_cross_entropy`; its log-probs come in the dtype of the head.

    chunks: "auto", its recommended ones, whose logits take as much memory as the hidden states; or "budget", as many
    rows as the budget holds logits of in float32, in which it accumulates.
    """
    mib = problem.setting.budget_mib
    budget = check_budget(None if mib is None else mib << 20, problem.device)  # by default that of the fused loss
    rows = max(1, budget // (4 * len(problem.weight)))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if chunks == "auto" else rows)

    def nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return of_counted_rows(nll, problem)


def quack_cross_entropy(problem: Problem) -> Loss:
    """Full logits, and kernels that overwrite them with their gradient: its only form that gives each token's loss."""
    cross_entropy = import_module("quack.linear_cross_entropy").linear_cross_entropy_func

    def nll(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(rows, weight, None, target, reduction="none", inplace_backward=True)

    return of_counted_rows(nll, problem)


def first_of(*reasons: WhyNot) -> WhyNot:
    return lambda problem: next((why for reason in reasons if (why := reason(problem))), None)


def packaged(name: str, module: str, loss: Callable[[Problem], Loss], *reasons: WhyNot) -> Rival:
    """A rival from a package of its own, which may not be installed; `reasons` are its others."""
    return Rival(name, first_of(*reasons, without(module)), loss, module)


def missing(rivals: Iterable[Rival], device: str) -> dict[str, str]:
    """Name and package of those that only need to be installed to run on this device."""
    pair = Problem(Setting(vocabulary=2, width=1, response=1), device)  # what every rival has a form of
    packaged_ones = {rival.name: rival for rival in rivals if rival.module}
    return {
        name: PACKAGES[top(rival.module)]
        for name, rival in packaged_ones.items()
        if rival.why_not(pair) == not_installed(rival.module)
    }


def not_installed(module: str) -> str:
    return f"{PACKAGES[top(module)]} is not installed: pip install '{PACKAGES[top(module)]}'"


def without(module: str) -> WhyNot:
    def reason(_problem: Problem) -> str | None:
        if importlib.util.find_spec(top(module)) is None:
            return not_installed(module)
        return None if importlib.util.find_spec(module) else f"the installed {PACKAGES[top(module)]} has no {module}"

    return reason


def top(module: str) -> str:
    return module.split(".")[0]


def off_gpu(problem: Problem) -> str | None:
    return None if problem.device.type == "cuda" else "its kernels need a GPU"


def off_hopper(problem: Problem) -> str | None:
    if problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device)[0] >= 9:
        return None
    return "its kernels need a Hopper GPU or a newer one"


def no_compiler(problem: Problem) -> str | None:
    if problem.device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "torch.compile needs a C++ compiler on the CPU, and finds no g++"


def softcapped(problem: Problem) -> str | None:
    return "it has no softcap" if problem.softcap else None


def not_pairs(problem: Problem) -> str | None:
    if problem.setting.sources:
        return "it has chosen and rejected only, no third response"
    chosen, rejected = problem.ref_logp.chunk(2)
    return None if torch.equal(chosen, rejected) else "it cannot take reference log-probs that are known"


def old_torch(_problem: Problem) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy, 2.13 does"


def float32_gradients(problem: Problem) -> str | None:
    if problem.device.type == "cuda" and problem.hidden.dtype == torch.float32 and problem.leaves():
        return "its kernels have no backward in float32"
    return None


RIVALS = (
    Rival("plain torch", lambda _problem: None, plain),
    Rival("torch.compile", no_compiler, compiled_plain),
    Rival("torch linear CE", first_of(old_torch, softcapped), partial(torch_linear_ce, chunks="auto")),
    Rival("torch linear CE (budget)", first_of(old_torch, softcapped), partial(torch_linear_ce, chunks="budget")),
    packaged("TRL selective", "trl", trl_selective),
    packaged("TRL fused head", "trl.kernels", trl_fused_head),
    packaged("Liger DPO", "liger_kernel", partial(liger_dpo, compiled=False), softcapped, not_pairs),
    packaged(
        "Liger DPO compiled", "liger_kernel", partial(liger_dpo, compiled=True), softcapped, not_pairs, no_compiler
    ),
    packaged("Liger linear CE", "liger_kernel", liger_cross_entropy, off_gpu),
    packaged("CCE", "cut_cross_entropy", cut_cross_entropy, no_compiler, float32_gradients),
    packaged("quack", "quack", quack_cross_entropy, softcapped, off_hopper),
)
COMPILED = frozenset({"torch.compile", "Liger DPO compiled", "CCE"})  # these take seconds at each new shape
