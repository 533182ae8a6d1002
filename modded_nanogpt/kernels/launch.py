"""What every Triton kernel's caller asks: does Triton run here, and on which GPU shall the launch happen."""

import contextlib

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # a CPU build of torch brings no Triton; CPU tensors take the plain twins
    triton = None

# With TRITON_INTERPRET=1 kernels run on CPU tensors, slowly, statement by statement: how tests run them without a GPU.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def uses_kernels(tensor: Tensor) -> bool:
    """Whether kernels (rather than their plain twins) serve a tensor of this device."""
    return tensor.is_cuda or INTERPRETED


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which Triton launches on this tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
