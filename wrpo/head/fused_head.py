"""A loss computed in the place of a model's logits, inside the model's own forward.

    install_fused_head(model)              once, on any AutoModelForCausalLM, wrapped by PEFT or not
    loss = run_in_head(model, head_fn, input_ids=..., attention_mask=...)

The model runs as always until its hidden states reach its output head. There the head calls

    head_fn(hidden, weight, bias=..., adapter=..., logit_scale=..., softcap=...)

and passes the result on as if it were logits. Because this is the model's forward and the head's own call, DDP, FSDP,
ZeRO, autocast and gradient checkpointing see what they know: their hooks gather the head's weight before and are armed
for the backward after. `model` may be the wrapped model.

Two rules follow from the wrappers, which cast what passes through them (as FSDP2's output_dtype does). The value is
that which `head_fn` made, and only its gradient goes by way of the wrappers' hooks, which arm their backward. Tensors
that must keep their type (reference log-probs: hundreds of nats) travel in `head_fn`'s closure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import refuse_packed, with_attention
from .operands import head_operands, kind_of
from .scores import HeadScores, agreeing_transform, transforms_of

_SCORES = "wrpo_head_scores"  # attributes of a model whose forward takes `head_fn`
_FORWARD_BEFORE = "wrpo_forward_before"

HeadFn = Callable[..., Any]


def install_fused_head(model: nn.Module, *, check: bool = True) -> HeadScores:
    """Let `model`'s forward take `head_fn`, and find out what it does to its logits.

    The config says what may be done to the logits (`final_logit_softcapping`, `logit_scale`, `logits_scaling`, ...);
    the model's own logits on a few tokens decide. Calling it again changes nothing. Saving, copying, generating and
    plain calls of the model stay as they were; the check leaves no trace in modes, random state or gradients.

    Args:
        model: a causal language model of transformers, or a PEFT model around one, on the device where it will run.
        check: compare with the model's own logits. Without it the config is believed. Default: True.

    Returns:
        The transform of the logits that the fused head applies.

    Raises:
        TypeError: no causal LM with an output head, or a head or adapter whose weight is not known how to read.
        ValueError: the model treats its logits in a way that the fused head does not know, adds a loss of its own, or
            makes logits that are no numbers; or an adapter is merged into its weights.
    """
    causal_lm = find_causal_lm(model)
    refuse_merged(causal_lm)
    known = causal_lm.__dict__.get(_SCORES)
    if known is not None and not _has_own_forward(causal_lm):
        return known
    candidates = transforms_of(causal_lm.config)
    _accept_head_fn(causal_lm)
    causal_lm.__dict__[_SCORES] = candidates[0]
    if check:
        try:
            causal_lm.__dict__[_SCORES] = agreeing_transform(causal_lm, candidates)
        except BaseException:
            remove_fused_head(causal_lm)
            raise
    return causal_lm.__dict__[_SCORES]


def check_fused_head(model: nn.Module, wrapped: nn.Module) -> None:
    """The check that `install_fused_head` had to leave out, of a model that can run only in its wrapper.

    Raises:
        ValueError: the model treats its logits in a way that the fused head does not know, or they are no numbers.
    """
    causal_lm = find_causal_lm(model)
    causal_lm.__dict__[_SCORES] = agreeing_transform(causal_lm, transforms_of(causal_lm.config), wrapped)


def remove_fused_head(model: nn.Module) -> None:
    """Give the model back the forward that it had before `install_fused_head`."""
    state = find_causal_lm(model).__dict__
    if state.pop(_SCORES, None) is not None:
        state.pop("forward", None)
        if _FORWARD_BEFORE in state:
            state["forward"] = state.pop(_FORWARD_BEFORE)


def run_in_head(model: nn.Module, head_fn: HeadFn, **inputs: Any) -> Any:
    """Run `model` with `head_fn` in the place of its logits, and return what `head_fn` returned.

    Args:
        model: a model with a fused head, or a wrapper of one (DDP, FSDP, PEFT, ...).
        head_fn: called once, as head_fn(hidden [S, T, D], weight [V, D], bias=[V] or None, logit_scale=float,
            softcap=float or None), and adapter=(low [S, T, r], up [V, r]) where a LoRA is on the head. Returns a
            tensor, or a NamedTuple with a field `loss`. The tensor, or `loss`, takes part in the model's forward and
            carries the gradient; the other fields are handed over as they are. Values and types are those that
            `head_fn` made, whatever a mixed-precision wrapper does to the model's output. The gradient of the tensor is
            cast with that output: reduce to a loss inside `head_fn`.
        **inputs: of the model's forward: input_ids, attention_mask, ... With `hidden_rows` [N], the flat places of rows
            in [S T], the head sees these alone, hidden [N, D] and low [N, r]. `segment`, `branch` or `segment_bounds`
            take the place of a mask (`wrpo.head.attention`).

    Raises:
        RuntimeError: the model's forward did not call `head_fn`: it has no fused head.
        ValueError: `adapter_names` among the inputs, and an adapter on the head; or rows with several sequences by
            bounds, of which the model does not tell its attention.
    """
    returned: list[Any] = []
    if inputs.get("adapter_names") is not None:
        _refuse_mixed_batch(model)

    def keep_the_rest(*operands: Any, **options: Any) -> Tensor:
        returned[:] = [head_fn(*operands, **options)]
        return returned[0] if isinstance(returned[0], Tensor) else returned[0].loss

    through_the_model = model(**inputs, head_fn=keep_the_rest)
    if not returned:
        raise RuntimeError(
            f"{type(model).__name__} has no fused head: its forward did not call head_fn; call "
            "install_fused_head(model) first (loading a pickled model drops the head)"
        )
    if isinstance(returned[0], Tensor):
        return _with_gradient_of(through_the_model, returned[0])
    return returned[0]._replace(loss=_with_gradient_of(through_the_model, returned[0].loss))


def _with_gradient_of(through_the_model: Tensor, value: Tensor) -> Tensor:
    """The value as the head made it; its gradient goes to the tensor that came through the model's hooks."""
    value = value.detach().to(through_the_model.device)
    if not (torch.is_grad_enabled() and through_the_model.requires_grad):
        return value
    return value + (through_the_model - through_the_model.detach()).to(value.dtype)


def find_causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT wrappers.

    Raises:
        TypeError: it has no output head, or an adapter that changes the positions of its input.
        ValueError: it is an encoder-decoder, or its config asks for a loss that the fused head would drop.
    """
    adapters = getattr(model, "peft_config", None) or {}
    if adapters and hasattr(model, "get_base_model"):
        for name, adapter in adapters.items():
            if getattr(adapter, "is_prompt_learning", False):
                raise TypeError(
                    f"adapter {name!r} is {adapter.peft_type}: its virtual tokens shift the labels; use LoRA"
                )
        model = model.get_base_model()
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise TypeError(f"{type(model).__name__} has no output head; expected a causal language model of transformers")
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only model")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__}: config.output_router_logits asks for the routers' auxiliary loss, which is not "
            "part of this loss; set it to False"
        )
    return model


def refuse_merged(model: nn.Module) -> None:
    """Raises ValueError: a merged adapter does not train, and PEFT takes it out of the weights to switch it off."""
    merged = sorted({name for module in model.modules() for name in getattr(module, "merged_adapters", ())})
    if merged:
        raise ValueError(
            f"adapter {', '.join(map(repr, merged))} is merged into its weights: call model.unmerge_adapter() to train "
            "it, or model = model.merge_and_unload() for a plain model"
        )


def adapts_tied_weight(model: nn.Module) -> bool:
    """Whether an adapter is on one end of a model whose embedding and head share their weight; merged, it is on both.

    A copy of PEFT's `modules_to_save` shares nothing.
    """
    causal_lm = find_causal_lm(model)
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embedding, head = (getattr(end, "weight", None) for end in ends)
    return embedding is head and any(kind_of(end).__module__.startswith("peft.tuners.") for end in ends)


def _refuse_mixed_batch(model: nn.Module) -> None:
    """Before PEFT hangs its hooks into the layers: an error in the head would leave them there, and in force."""
    for module in model.modules():
        if _SCORES in module.__dict__ and kind_of(module.get_output_embeddings()).__module__.startswith("peft."):
            raise ValueError(
                "adapter_names (another adapter for each row) with an adapter on the output head is not known to the "
                "fused head: run the rows of each adapter by themselves, with model.set_adapter(name)"
            )


def _has_own_forward(model: nn.Module) -> bool:
    """Whether the forward is that of the class, as pickling leaves it, which keeps a bound method by name alone."""
    own = MethodType(type(model).forward, model)
    return bool(model.__dict__.get("forward", own) == own)


def _accept_head_fn(model: nn.Module) -> None:
    """Replace the forward of this instance, not of its class. It is bound, so that a deep copy gets its own."""
    if not _has_own_forward(model):  # a hook of accelerate, for example
        model.__dict__[_FORWARD_BEFORE] = model.__dict__["forward"]

    def forward(self: nn.Module, *args: Any, head_fn: HeadFn | None = None, **kwargs: Any) -> Any:
        plain = self.__dict__.get(_FORWARD_BEFORE) or MethodType(type(self).forward, self)
        if head_fn is None:
            refuse_packed(kwargs)
            return plain(*args, **kwargs)
        hidden_rows = kwargs.pop("hidden_rows", None)
        with _loss_in_place_of_logits(self, head_fn, hidden_rows) as call:
            given = with_attention(self, kwargs)
            plain(*args, use_cache=False, **given)
            if "segments" in given:
                given["segments"].check_arrived(type(self).__name__)
        if call.result is None:
            raise RuntimeError(f"{type(self).__name__} did not run its output head; its logits come from elsewhere")
        return call.result

    forward.__signature__ = _with_head_fn(inspect.signature(model.forward))  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


def _with_head_fn(bound: inspect.Signature) -> inspect.Signature:
    """The model's own signature, which `generate` and the Trainer read, with `head_fn` added."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *bound.parameters.values()]
    head_fn = inspect.Parameter("head_fn", inspect.Parameter.KEYWORD_ONLY, default=None)
    last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    return inspect.Signature([*parameters[:last], head_fn, *parameters[last:]])


@contextmanager
def _loss_in_place_of_logits(
    model: nn.Module, head_fn: HeadFn, hidden_rows: Tensor | None
) -> Iterator[SimpleNamespace]:
    """While it lasts, the head returns head_fn's tensor as [1, 1, n]; `result` is that tensor behind its hooks."""
    head = model.get_output_embeddings()
    head = getattr(head, "_fsdp_wrapped_module", head)  # FSDP1 gathers around the module that it wraps
    call = SimpleNamespace(result=None, shape=None)

    @torch.compiler.disable  # a compiled model ends its graph here; the kernels need no compiler
    def forward(hidden: Tensor) -> Tensor:
        if hidden_rows is not None:
            # A look-up: where a row is wanted several times, its gradients are added up in one order on every device.
            hidden = nn.functional.embedding(hidden_rows.to(hidden.device), hidden.flatten(0, -2))
        with _decided_dtype(hidden) as hidden:
            weight, bias, adapter = head_operands(head, hidden)
            lora = {} if adapter is None else {"adapter": adapter}  # a head_fn that knows none then fails loudly
            result = head_fn(hidden, weight, bias=bias, **lora, **model.__dict__[_SCORES]._asdict())
        call.shape = result.shape
        return result.reshape(1, 1, -1).clone()

    @torch.compiler.disable
    def capture(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        if call.result is not None:
            raise RuntimeError(f"{type(model).__name__} runs its output head twice in one forward; expected once")
        # Clones on both sides: what the model does to its logits in place must not reach the loss, and FSDP2 hangs its
        # backward hook on this tensor, which an in-place change of a view would shake off.
        call.result = output.reshape(call.shape).clone()

    # accelerate's device hooks keep the forward that they call under this name.
    slot = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    before = head.__dict__.get(slot)
    head.__dict__[slot] = forward
    handle = head.register_forward_hook(capture)
    try:
        yield call
    finally:
        handle.remove()
        head.__dict__.pop(slot)
        if before is not None:
            head.__dict__[slot] = before


@contextmanager
def _decided_dtype(hidden: Tensor) -> Iterator[Tensor]:
    """Hidden states in the type in which autocast would run the head; from here on types are explicit, autocast off."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        yield hidden
