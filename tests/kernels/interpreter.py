"""Makes Triton's interpreter compute with bfloat16 like a GPU.

It cuts a float32 off to bfloat16 (Triton 3.6 to 3.9), where every GPU rounds to nearest even: errors would lean to one
side, and the error rule would rightly fail. And its matrix product takes the bits of bfloat16 values for integers.
"""

from __future__ import annotations

from functools import cache

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
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
