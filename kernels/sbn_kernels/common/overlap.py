"""A kernel begins while the kernel before it on the same stream ends (programmatic dependent launch, from Hopper on).

A prompt of 512 tokens runs hundreds of kernels of a few microseconds each, and between two of them the GPU waits for
about one more. A kernel that is launched early is set up in that time, and then waits in the device.

``begin`` comes before everything that a kernel reads or writes in global memory. It lets the next kernel be set up, and
waits until the kernels before this one have ended and all that they wrote can be seen. So every kernel that begins
early has waited for the kernels before it, and its end says that theirs has come, too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernels before this one, if this one was launched early."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
