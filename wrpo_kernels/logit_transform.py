"""What a language model does to its logits after the head's matrix product.

    z = logit_scale * (h W^T + bias)            Cohere multiplies; Granite's `logits_scaling` divides: pass 1 / it
    z = softcap * tanh(z / softcap)             Gemma-2's `final_logit_softcapping`
    z = z / temperature                         sampling temperature, last

This is the order in which the models themselves apply them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wrpo_kernels.checks import check_device, check_float, check_float32, check_number, check_shape, check_tensor


class LogitTransform(NamedTuple):
    bias: Tensor | None  # [V] or None
    logit_scale: float
    softcap: float  # 0 means none
    temperature: float

    @property
    def slope(self) -> float:
        """d z / d (h W^T) where the softcap does not bend."""
        return self.logit_scale / self.temperature

    @property
    def scalars(self) -> tuple[float, float, float]:
        """As the compiled kernels take them."""
        return self.logit_scale, self.softcap, 1.0 / self.temperature


def check_bias(name: str, bias: Tensor | None, like: Tensor, vocabulary: int) -> None:
    if bias is not None:
        check_tensor(name, bias)
        check_float(name, bias)
        check_shape(name, bias, "[V]", vocabulary)
        check_device(name, bias, "the scores", like.device)


def check_transform(
    bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float, like: Tensor, vocabulary: int
) -> None:
    check_bias("bias", bias, like, vocabulary)
    check_scalars(logit_scale, softcap, temperature)


def check_scalars(logit_scale: float, softcap: float | None, temperature: float) -> None:
    check_number("logit_scale", logit_scale)
    if softcap is not None:
        check_number("softcap", softcap, least=0.0)
    check_number("temperature", temperature, above=0.0)
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap or 0.0), ("temperature", temperature)):
        check_float32(name, value)  # kernels hold it and its reciprocal in float32
    check_float32("logit_scale / temperature", logit_scale / temperature)
