"""`linear_preference_loss` names what is wrong with an argument."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from uneven_batch import Batch, budgets, heads, run

from wrpo_kernels import linear_preference_loss

GOOD = {
    "hidden": torch.zeros(6, 3, 4),
    "weight": torch.zeros(5, 4),
    "labels": torch.zeros(6, 3, dtype=torch.int64),
    "seq_weight": torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]),
    "group": torch.tensor([0, 1, 2, 0, 1, 2]),
    "beta": 0.1,
}


PACKED = {"hidden": torch.zeros(18, 4), "labels": torch.zeros(18, dtype=torch.int64)}


def bounds(*values: int, dtype: torch.dtype = torch.int64) -> dict:
    return PACKED | {"cu_seqlens": torch.tensor(values, dtype=dtype)}


REFUSED = {
    "the backend of linear_token_logp alone": (
        {"backend": "triton_fused"},
        ValueError,
        r"backend.*'native', 'cuda', 'triton', 'reference', 'triton_exp'\].*'triton_fused'",
    ),
    "a backend that is a number": ({"backend": 1}, TypeError, "backend.*name of a backend.*int"),
    "labels of another type": ({"labels": [[0]]}, TypeError, "labels.*list"),
    "float labels": ({"labels": torch.zeros(6, 3)}, ValueError, "labels.*int64.*float32"),
    "labels of another shape": ({"labels": torch.zeros(6, 4).long()}, ValueError, r"labels.*\[6, 3\].*\[6, 4\]"),
    "labels elsewhere": ({"labels": torch.zeros(6, 3).long().to("meta")}, ValueError, "labels.*cpu.*meta"),
    "label V": ({"labels": torch.full((6, 3), 5)}, ValueError, "labels.*V ?= ?5.*5"),
    "label -1": ({"labels": torch.full((6, 3), -1)}, ValueError, "labels.*-1"),
    "sparse hidden": ({"hidden": torch.zeros(6, 3, 4).to_sparse()}, ValueError, r"hidden.*dense.*sparse_coo.*to_dense"),
    "sparse weight": (
        {"weight": torch.zeros(5, 4).to_sparse()},
        ValueError,
        r"weight.*dense.*sparse_coo.*to_dense",
    ),
    "hidden of another type": ({"hidden": None}, TypeError, "hidden.*NoneType"),
    "hidden of another width": ({"hidden": torch.zeros(6, 3, 5)}, ValueError, r"hidden.*D=4.*\[6, 3, 5\]"),
    "packed without cu_seqlens": (PACKED, ValueError, r"labels.*\[S, T\].*cu_seqlens.*\[18\]"),
    "four dimensions": (
        {"hidden": torch.zeros(2, 3, 3, 4), "labels": torch.zeros(2, 3, 3).long()},
        ValueError,
        r"labels.*\[S, T\].*\[2, 3, 3\]",
    ),
    "weight a vector": ({"weight": torch.zeros(4)}, ValueError, r"weight.*\[V, D\].*\[4\]"),
    "bias of another shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[5\].*\[4\]"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap.*-1"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
    "ref_logp of tokens": ({"ref_logp": torch.zeros(6, 3)}, ValueError, r"ref_logp.*\[S\].*\[6\].*\[6, 3\]"),
    "ref_logp that wants a gradient": ({"ref_logp": torch.zeros(6, requires_grad=True)}, ValueError, "ref_logp.*grad"),
    "half-precision ref_logp": ({"ref_logp": torch.zeros(6).half()}, ValueError, "ref_logp.*float32.*float16"),
    "seq_weight of another length": ({"seq_weight": torch.ones(3)}, ValueError, r"seq_weight.*\[6\].*\[3\]"),
    "group of another length": ({"group": torch.zeros(3).long()}, ValueError, r"group.*\[6\].*\[3\]"),
    "group beyond G": ({"num_groups": 2}, ValueError, "group.*G=2.*2"),
    "negative group": ({"group": torch.tensor([0, 1, 2, 0, -1, 2])}, ValueError, "group.*-1"),
    "group_weight of another length": ({"group_weight": torch.ones(2)}, ValueError, r"group_weight.*\[3\].*\[2\]"),
    "nll_weight of another length": ({"nll_weight": torch.ones(2)}, ValueError, r"nll_weight.*\[6\].*\[2\]"),
    "beta 0": ({"beta": 0.0}, ValueError, "beta.*> 0"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta.*str"),
    "NaN gamma": ({"gamma": math.nan}, ValueError, "gamma.*nan"),
    "gamma as text": ({"gamma": "1"}, TypeError, "gamma.*str"),
    "smoothing 1/2": ({"label_smoothing": 0.5}, ValueError, "label_smoothing"),
    "unknown loss": ({"loss_type": "dpo"}, ValueError, "loss_type.*'dpo'"),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction.*'avg'"),
    "normalizer of a sum": ({"normalizer": 8, "reduction": "sum"}, ValueError, "normalizer.*'sum'"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer.*0"),
    "unknown empty": ({"empty": "skip"}, ValueError, "empty.*'skip'"),
    "no budget": ({"budget_bytes": 0}, ValueError, "budget_bytes.*0"),
    "budget as text": ({"budget_bytes": "1GB"}, TypeError, "budget_bytes.*str"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend.*'fast'"),
    "length given twice": ({"length": torch.ones(6).long()}, TypeError, "length"),
    "cu_seqlens of padded labels": ({"cu_seqlens": torch.tensor([0, 18])}, ValueError, r"labels.*\[N\].*\[6, 3\]"),
    "cu_seqlens a list": (PACKED | {"cu_seqlens": [0, 18]}, TypeError, "cu_seqlens.*list"),
    "float cu_seqlens": (PACKED | {"cu_seqlens": torch.arange(0.0, 19, 3)}, ValueError, "cu_seqlens.*int32.*float32"),
    "cu_seqlens a matrix": (PACKED | {"cu_seqlens": torch.zeros(7, 1).long()}, ValueError, r"cu_seqlens.*\[7, 1\]"),
    "cu_seqlens empty": (PACKED | {"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens.*\[S\+1\].*\[0\]"),
    "cu_seqlens that falls": (bounds(0, 3, 9, 6, 12, 15, 18), ValueError, r"cu_seqlens.*rise.*N=18.*9, 6"),
    "cu_seqlens from 1": (bounds(1, 3, 6, 9, 12, 15, 18), ValueError, r"cu_seqlens.*0 to N=18.*\[1, 3"),
    "cu_seqlens that ends early": (bounds(0, 3, 6, 9, 12, 15, 17), ValueError, "cu_seqlens.*N=18.*17"),
    "cu_seqlens beyond the rows": (bounds(0, 3, 6, 9, 12, 15, 19), ValueError, "cu_seqlens.*N=18.*19"),
    "cu_seqlens of fewer sequences": (bounds(0, 9, 18), ValueError, r"(seq_weight|group).*\[2\].*\[6\]"),
    "an empty packed sequence": (bounds(0, 3, 3, 9, 12, 15, 18), ValueError, "sequence 1 has no counted token"),
}


@pytest.mark.parametrize("trained", [False, True], ids=["no gradient", "trained head"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name, trained):
    changes, error, message = REFUSED[name]
    arguments = {**GOOD, **changes}
    if trained and isinstance(arguments["weight"], Tensor):
        arguments["weight"] = arguments["weight"].clone().requires_grad_()
    with pytest.raises(error, match=f"(?s){message}"):
        linear_preference_loss(**arguments)


@budgets
@heads
def test_the_position_of_a_wrong_label_is_the_users(head, rows, backend, device):
    """Its number in the flattened labels, not among the rows that count nor within a chunk."""
    batch = Batch(head, torch.float32, device)
    batch.labels[4, 5] = head[0]
    read = torch.autograd.set_detect_anomaly(device.type == "cuda")  # there the kernels read labels only when asked
    with read, pytest.raises(ValueError, match=rf"labels\[(69|4, 5)\].*V ?= ?{head[0]}.*{head[0]}"):
        run(
            batch,
            batch.tensors(False),
            {"hidden", "weight"},
            beta=0.1,
            budget_bytes=batch.budget(rows),
            backend=backend,
            **batch.options,
        )
