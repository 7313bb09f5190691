"""What a model's attention is told of rows that hold several sequences (`wrpo.data.layout`).

A token q sees a token k of its row if

    k <= q,  segment[k] == segment[q]  and  branch[k] in (0, branch[q])

and, in layers with a window or with chunks, if the two are that near by their position_ids, as they would be in a row
of their own. Attention of transformers takes it in one of three forms:

    mask     sdpa, eager          [R, 1, T, T], bool or for eager 0 and the lowest number
    blocks   flex_attention       a `BlockMask` of the same rule
    bounds   flash_attention_2.., no mask: all segments in one row, and where each begins
             sdpa on a CPU        (`wrpo.head.segment_attention`)

Models with layers of several types take a dict of masks by type, as transformers' own `generate` hands them over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .segment_attention import Piece, Sees, Segments, known_by_attention, pieces_of

# In a batch, and in no model's forward.
OF_PLACES = ("segment", "branch", "segment_bounds", "query_bounds", "key_bounds", "key_rows")
# Of all that a batch may hold, what goes into the model.
OF_MODEL = ("input_ids", "attention_mask", "position_ids", "hidden_rows", *OF_PLACES)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `run_in_head` takes of a batch of any layout."""
    return {name: batch[name] for name in OF_MODEL if name in batch}


def attention_forms(model: nn.Module) -> tuple[str, ...]:
    """Of mask, blocks and bounds those that the model's attention takes, the fastest first.

    Raises:
        ValueError: the model's attention takes none of them.
    """
    name = _attention_name(model)
    if name == "sdpa" and next(model.parameters()).device.type == "cpu":
        return ("bounds", "mask")
    if name in ("sdpa", "eager"):
        return ("mask",)
    if name == "flex_attention":
        return ("blocks",)
    if "flash" in name:
        return ("bounds",)
    raise ValueError(f"attn_implementation {name!r} is not known to take a mask, blocks or bounds")


def _attention_name(model: nn.Module) -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", None))


def with_attention(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model's own forward: the names of `OF_PLACES` as its attention takes them.

    Raises:
        ValueError: the batch was made for another attention than the model's.
    """
    plain = {name: value for name, value in inputs.items() if name not in OF_PLACES}
    if "segment" not in inputs:
        return plain
    has_bounds = inputs.get("segment_bounds") is not None
    _check_form(model, has_bounds)
    if not has_bounds:
        return plain | {"attention_mask": masks(model, inputs["position_ids"], inputs["segment"], inputs["branch"])}
    name = _attention_name(model)
    known_by_attention(name)
    if name == "sdpa":
        # One that holds for the whole row, which no model changes, and that the pieces replace.
        whole = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return plain | {"attention_mask": whole, "segments": Segments(pieces(model, inputs))}
    return plain | _bounds(inputs)


def _check_form(model: nn.Module, has_bounds: bool) -> None:
    forms = attention_forms(model)
    if ("bounds" not in forms) if has_bounds else forms == ("bounds",):
        made_for, name = "bounds" if has_bounds else "mask or blocks", _attention_name(model)
        raise ValueError(
            f"the batch is made for attention by {made_for}, and attn_implementation {name!r} of "
            f"{type(model).__name__} goes by {forms[0]}: make the collator with Layout(name, {forms[0]!r})"
        )


def _bounds(inputs: dict[str, Any]) -> dict[str, Any]:
    """As flash-attention takes them: bounds of queries and of keys, causal from the last query and key backwards."""
    segments, most = inputs["segment_bounds"], inputs["input_ids"].shape[1]
    return {
        "attention_mask": None,
        "cu_seq_lens_q": inputs.get("query_bounds", segments),
        "cu_seq_lens_k": inputs.get("key_bounds", segments),
        "max_length_q": most,  # of a segment: a bound that no device is waited for
        "max_length_k": most,
        "segments": Segments(key_rows=inputs.get("key_rows")),
    }


def pieces(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Piece]]:
    """By type of layer, what attention over this row is computed in.

    Raises:
        ValueError: layers of a type that takes no bounds.
    """
    config = model.config.get_text_config()
    bounds = inputs["segment_bounds"].tolist()
    made = {}
    for kind in layer_types(config):
        if kind == "chunked_attention":
            raise ValueError(f"{type(config).__name__}: layers of type {kind!r} take no bounds")
        sees = seeing(kind, config, inputs["position_ids"], inputs["segment"], inputs["branch"])
        is_near = kind == "sliding_attention" and inputs["position_ids"].max() >= config.sliding_window
        made[kind] = pieces_of(inputs["branch"][0], bounds, sees, is_near=bool(is_near))
    return made


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
    if attention_forms(model) == ("blocks",):
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
