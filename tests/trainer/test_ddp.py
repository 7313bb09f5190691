"""Two processes (DDP and FSDP2 over gloo) with rows that they do not divide train exactly what one process trains.

In rows that share prompts or are packed; the sharded model's, beside padded ones of the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import PAD, tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, SETTINGS, training_lines
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import run_in_two_processes

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer
from wrpo.data import PreferenceCollator
from wrpo.data.layout import Layout
from wrpo.head import install_fused_head, run_in_head
from wrpo.head.attention import model_inputs
from wrpo.reference.fingerprint import model_fingerprint
from wrpo_kernels import linear_wrpo_loss

PREFERENCE = {"beta": 1.0, "nll_weight": 0.3, "empty_response": "zero", "alpha": 0.4, "alpha_start": 0.2}
# Three steps: in the first all rewards are 0, the third follows what both ranks saw in the second.
ADAPTIVE = {
    "source_weighting": "margin", "source_temperature": 0.5, "alpha_schedule": "adaptive", "alpha_goal_accuracy": 0.9,
    "num_train_epochs": 3, "learning_rate": 0.1,
}  # fmt: skip
RUNS = ("full-precompute", "full-copy", "lora-adapter", "sft", "adaptive-copy")


def rows() -> list[dict]:
    """Seven rows, so that one of the ranks gets one again; one has nothing to count in its rejected response."""
    names = [["a", "b"], ["b", "c"], ["c", "a"]]
    out = [{**row, "model": [*names[i % 3], None, None]} for i, row in enumerate(tiny_rows(7, sources=2))]
    *preferred, rejected = out[5]["response_ids"]
    out[5] = {**out[5], "prompt_ids": [], "response_ids": [*preferred, rejected[:1]]}
    return out


def train(run: str, folder: Path, processes: int) -> dict:
    """A step over all rows, a row a micro-batch; then evaluation on 5 rows, which 2 ranks of 2 do not divide."""
    settings = {
        **SETTINGS,
        **ONE_GRADIENT,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 8 // processes,
        "layout": "packed" if run == "sft" else "shared",
    }
    data = {"train_dataset": rows(), "eval_dataset": tiny_rows(5, sources=2, seed=1)}
    model = tiny_model()
    if run == "sft":
        trainer = SFTTrainer(model, SFTConfig(output_dir=str(folder / run), **settings), **data)
    else:
        if run == "lora-adapter":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
        reference = run.rpartition("-")[2]
        settings |= PREFERENCE | (ADAPTIVE if run == "adaptive-copy" else {})
        args = WRPOConfig(output_dir=str(folder / run), reference=reference, **settings)
        trainer = WRPOTrainer(model, args, **data)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == trainer.args.num_train_epochs
    evaluated = trainer.evaluate()
    return {
        "change": {name: p.detach() - start[name] for name, p in trainer.model.named_parameters() if p.requires_grad},
        "log": {k: v for k, v in training_lines(trainer)[-1].items() if k not in ("grad_norm", "epoch")},
        "sums": trainer.performance.sums if run == "adaptive-copy" else None,
        "evaluated": {
            k: v for k, v in evaluated.items() if "runtime" not in k and "second" not in k and "time" not in k
        },
    }


def sharded_gradients(rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Gradients under FSDP2, body and head each sharded on their own, beside those of the same mean in one process.

    The budget holds five rows, so one rank takes more chunks than the other: a collective a chunk would never return.
    """

    def loss(model: nn.Module, part: list[dict], layout: Layout) -> torch.Tensor:
        batch = PreferenceCollator(PAD, layout=layout)(part)

        def head_fn(hidden, weight, **head):
            options = {"alpha": 0.3, "beta": 1.0, "num_sources": 2, "budget_bytes": 5000}
            bounds = batch.get("cu_seqlens")
            return linear_wrpo_loss(hidden, weight, batch["labels"], cu_seqlens=bounds, **options, **head)

        return run_in_head(model, head_fn, **model_inputs(batch)).loss

    parts = tiny_rows(5, sources=2)[:2], tiny_rows(5, sources=2)[2:]
    whole, sharded = tiny_model(), tiny_model()
    for model in (whole, sharded):
        install_fused_head(model)
    for module in (*sharded.model.layers, sharded.lm_head, sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    # FSDP averages over ranks.
    ((loss(whole, parts[0], Layout("padded")) + loss(whole, parts[1], Layout("padded"))) / 2).backward()
    loss(sharded, parts[rank], Layout("shared")).backward()
    return {name: (p.grad.full_tensor(), whole.get_parameter(name).grad) for name, p in sharded.named_parameters()}


def sharded_fingerprint() -> str:
    """Of 97 rows of vocabulary: the shards are not equally large."""
    model = tiny_model()
    for module in (*model.model.layers, model.lm_head, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return model_fingerprint(model, None, {})["model"]


def work(rank: int, folder: Path) -> dict[str, Any]:
    results = {run: train(run, folder / "two", processes=2) for run in RUNS}
    return {**results, "fsdp2": sharded_gradients(rank), "fingerprint": sharded_fingerprint()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("ddp")
    first, second = run_in_two_processes(work, folder)
    one = {run: train(run, folder / "one", processes=1) for run in RUNS}
    return {"one": one, "rank0": first, "rank1": second}


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_equal_on_both_ranks_bit_by_bit(run, results):
    first, second = results["rank0"][run]["change"], results["rank1"][run]["change"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_those_of_one_process(run, results):
    expected, got = results["one"][run]["change"], results["rank0"][run]["change"]
    assert expected.keys() == got.keys()
    largest = max(change.abs().max().item() for change in expected.values())
    assert largest > 0
    for name in expected:
        # The same terms, added up in another order; the change is read off weights of up to 1, half an ulp each way.
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5 * largest + 2e-7, msg=name)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("what", ["log", "evaluated"])
def test_logged_and_evaluated_values_are_means_over_all_ranks_without_repeats(run, what, results):
    expected = results["one"][run][what]
    assert len(expected) > 3 or run == "sft"
    for rank in ("rank0", "rank1"):
        assert results[rank][run][what] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_weights_that_follow_performance_are_those_of_all_ranks(results):
    one, rank0, rank1 = (results[who]["adaptive-copy"] for who in ("one", "rank0", "rank1"))
    assert torch.equal(rank0["sums"], rank1["sums"])
    torch.testing.assert_close(rank0["sums"], one["sums"], rtol=1e-5, atol=1e-5)
    shares = [rank0["log"][f"source_weight/{name}"] for name in ("a", "b", "c")]
    assert len(set(shares)) == 3, "the weights stood still"
    assert rank0["log"]["alpha"] > 0.2, "alpha stood still"


@pytest.mark.parametrize("rank", ["rank0", "rank1"])
def test_a_sharded_model_with_a_sharded_head_gives_the_gradients_of_a_whole_one(rank, results):
    for name, (got, expected) in results[rank]["fsdp2"].items():
        largest = expected.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * largest, msg=name)


def test_weights_that_are_spread_over_processes_are_the_same_model(results):
    whole = model_fingerprint(tiny_model(), None, {})["model"]
    assert results["rank0"]["fingerprint"] == results["rank1"]["fingerprint"] == whole


def test_the_reference_of_all_rows_was_shared_out_and_put_together(results, tmp_path_factory):
    """The loss of the first step is exactly what it is with policy = reference, on both ranks."""
    for rank in ("rank0", "rank1"):
        log = results[rank]["full-precompute"]["log"]
        assert abs(log["rewards/source_chosen"]) + abs(log["rewards/rejected"]) < 1e-4
        assert log["logps/rejected"] < -1
