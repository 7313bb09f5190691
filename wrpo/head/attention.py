"""What a model's attention is told of rows that hold several sequences (`wrpo.data.layout`).

A token q sees a token k of its row if

    k <= q,  segment[k] == segment[q]  and  branch[k] in (0, branch[q])

and, in layers with a window or with chunks, if the two are that near by their position_ids, as they would be in a row
of their own. Attention of transformers takes it in one of three forms:

    mask     sdpa, eager          [R, 1, T, T], bool or for eager 0 and the lowest number
    blocks   flex_attention       a `BlockMask` of the same rule
    bounds   flash_attention_2..  no mask: the bounds of the segments, which must not branch

Models with layers of several types take a dict of masks by type, as transformers' own `generate` hands them over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Sees = Callable[[Any, Any, Any, Any], Tensor]  # (row, head, q, k), as flex_attention calls it

OF_PLACES = ("segment", "branch", "segment_bounds")  # in a batch, and in no model's forward
# Of all that a batch may hold, what goes into the model.
OF_MODEL = ("input_ids", "attention_mask", "position_ids", "hidden_rows", *OF_PLACES)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `run_in_head` takes of a batch of any layout."""
    return {name: batch[name] for name in OF_MODEL if name in batch}


def attention_form(model: nn.Module) -> str:
    """mask, blocks or bounds.

    Raises:
        ValueError: the model's attention takes none of them.
    """
    name = str(getattr(model.config.get_text_config(), "_attn_implementation", None))
    if name in ("sdpa", "eager"):
        return "mask"
    if name == "flex_attention":
        return "blocks"
    if "flash" in name:
        return "bounds"
    raise ValueError(f"attn_implementation {name!r} is not known to take a mask, blocks or bounds")


def with_attention(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model's own forward: `segment`, `branch` and `segment_bounds` as its attention takes them.

    Raises:
        ValueError: the batch was made for another attention than the model's.
    """
    plain = {name: value for name, value in inputs.items() if name not in OF_PLACES}
    if "segment" in inputs:
        _check_form(model, has_bounds=inputs.get("segment_bounds") is not None)
    if (bounds := inputs.get("segment_bounds")) is not None:
        most = inputs["input_ids"].shape[1]  # tokens of a segment: a bound that no device is waited for
        return plain | {
            "attention_mask": None,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": most,
            "max_length_k": most,
        }
    if "segment" not in inputs:
        return plain
    return plain | {"attention_mask": masks(model, inputs["position_ids"], inputs["segment"], inputs["branch"])}


def _check_form(model: nn.Module, has_bounds: bool) -> None:
    form = attention_form(model)
    if has_bounds != (form == "bounds"):
        made_for = "bounds" if has_bounds else "mask or blocks"
        name = model.config.get_text_config()._attn_implementation
        raise ValueError(
            f"the batch is made for attention by {made_for}, and attn_implementation {name!r} of "
            f"{type(model).__name__} goes by {form}: make the collator with Layout(name, {form!r})"
        )


def refuse_packed(inputs: dict[str, Any]) -> None:
    """Raises ValueError for a batch in packed or shared rows, where nothing would make a mask of its places."""
    if found := [name for name in ("hidden_rows", *OF_PLACES) if name in inputs]:
        raise ValueError(
            f"a batch in packed or shared rows ({', '.join(found)}) goes through run_in_head(model, head_fn, ...), "
            "which tells the attention who sees whom; the model's own forward wants layout padded"
        )


def masks(model: nn.Module, position_ids: Tensor, segment: Tensor, branch: Tensor) -> Any:
    """The mask of the model's layers, or a dict of those of each type of layer.

    Raises:
        ValueError: layers of a type that keeps no mask.
    """
    config = model.config.get_text_config()
    by_type = {kind: seeing(kind, config, position_ids, segment, branch) for kind in layer_types(config)}
    rows, length = segment.shape
    if attention_form(model) == "blocks":
        from torch.nn.attention.flex_attention import create_block_mask

        shape = {"B": rows, "H": None, "Q_LEN": length, "KV_LEN": length}
        # Compiled, the matrix [R, T, T] is never there; on a CPU compiling costs more than it.
        options = {"device": segment.device, "_compile": segment.device.type != "cpu"}
        made = {kind: create_block_mask(sees, **shape, **options) for kind, sees in by_type.items()}
    else:
        place = torch.arange(length, device=segment.device)
        row = torch.arange(rows, device=segment.device)[:, None, None]
        made = {kind: sees(row, None, place[:, None], place)[:, None] for kind, sees in by_type.items()}
        if config._attn_implementation == "eager":
            made = {kind: added(mask, model.dtype) for kind, mask in made.items()}
    return made if len(made) > 1 else next(iter(made.values()))


def layer_types(config: Any) -> list[str]:
    """As transformers reads them, each once."""
    if types := getattr(config, "layer_types", None):
        return sorted(set(types))
    if getattr(config, "sliding_window", None):
        return ["sliding_attention"]
    return ["chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"]


def seeing(kind: str, config: Any, position_ids: Tensor, segment: Tensor, branch: Tensor) -> Sees:
    """The rule above for layers of a type; padding sees padding, so that no row of the softmax is empty."""
    if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
        raise ValueError(f"{type(config).__name__}: layers of type {kind!r} take no mask")

    def sees(row: Any, _head: Any, q: Any, k: Any) -> Tensor:
        branch_of_k = branch[row, k]
        of_branch = (branch_of_k == 0) | (branch_of_k == branch[row, q])
        return (k <= q) & (segment[row, k] == segment[row, q]) & of_branch

    def near(row: Any, head: Any, q: Any, k: Any) -> Tensor:
        return sees(row, head, q, k) & (position_ids[row, q] - position_ids[row, k] < config.sliding_window)

    def of_chunk(row: Any, head: Any, q: Any, k: Any) -> Tensor:
        size = config.attention_chunk_size
        return sees(row, head, q, k) & (position_ids[row, q] // size == position_ids[row, k] // size)

    return {"full_attention": sees, "sliding_attention": near, "chunked_attention": of_chunk}[kind]


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is true, else the lowest number of the type."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min)
