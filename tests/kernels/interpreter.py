"""Triton's interpreter, which plays the kernels on the CPU: bfloat16 as on a GPU, and without work done over and over.

It cuts a float32 off to bfloat16 (Triton 3.6 to 3.9), where every GPU rounds to nearest even: errors would lean to one
side, and the error rule would rightly fail. And its matrix product takes the bits of bfloat16 values for integers; here
it sums in float64, where a row has the same sums wherever in a tile it stands, as on a GPU. NumPy's float32 ones differ
in their last bit by place (seen with AVX-512 on an AMD CPU).
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch


@cache
def compute_like_a_gpu() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16).reshape(src.data.shape), dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), dst_type.scalar)
        return plain(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar != tl.bfloat16 or b.dtype.scalar != tl.bfloat16:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        wide = (self.cast_impl(x, tl.float32).data.astype(np.float64) for x in (a, b))
        with np.errstate(all="ignore"):  # infinities are made without a word, as on a GPU
            return TensorHandle(np.matmul(*wide).astype(np.float32) + d.data, d.dtype.scalar)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    patch_the_language_once_a_launch()


def patch_the_language_once_a_launch() -> None:
    """Not for each function that a kernel calls, which finds it patched: half of the time of a launch (Triton 3.9).

    After a launch the interpreter restores what it was told has changed (Triton 3.6 to 3.9): here nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @cache
    def languages_of(function):
        return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]

    def patch_lang(function):
        if any(tl.core.is_builtin(language.load) for language in languages_of(function)):
            return patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_lang
