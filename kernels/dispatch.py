"""Which implementation runs: Triton where it can, PyTorch everywhere else, and why."""

import os
import sys

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: PyTorch is shipped without it
    triton = tl = None

BACKENDS = ("auto", "torch", "triton")
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import, so do we
_wish = os.environ.get("SANASR_KERNELS", "auto")
_said = set()


def set_backend(name):
    """Choose for all later calls: "auto" (Triton where usable), "torch", or "triton" (the same as auto, but says
    on stderr why where it cannot). The environment variable SANASR_KERNELS sets the initial value."""
    global _wish
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _wish = name


@torch.compiler.assume_constant_result
def _device_obstacle(kind, index):
    """Why Triton cannot run on this device, or None."""
    if triton is None:
        return "triton is not installed"
    if INTERPRET:
        return None
    if kind != "cuda":
        return f"the tensors are on {kind}, the kernels need an NVIDIA GPU"
    if torch.version.cuda is None:
        return "the kernels are written and compiled for NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def use_triton(tensor, backend=None, obstacle=None):
    """True where the Triton kernel is to run for `tensor`.

    `backend` is the caller's argument: None follows SANASR_KERNELS and falls back to PyTorch where Triton cannot run;
    an explicit "triton" raises ValueError there instead. `obstacle` is the operator's own reason against, if any.
    The choice is said once on stderr where a GPU is present or SANASR_KERNELS is "triton"; else in silence.
    """
    wish = _wish if backend is None else backend
    if wish not in BACKENDS:
        source = "SANASR_KERNELS" if backend is None else "backend"
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {wish!r}")
    if wish == "torch":
        return False
    if tensor.dtype == torch.float64:
        obstacle = obstacle or "float64 is computed by the reference"
    obstacle = _device_obstacle(tensor.device.type, tensor.device.index) or obstacle
    if obstacle and backend == "triton":
        raise ValueError(f'backend="triton" cannot be used: {obstacle}')
    if (tensor.is_cuda or wish == "triton") and not torch.compiler.is_compiling():
        _say(f"PyTorch, since {obstacle}" if obstacle else "Triton")
    return obstacle is None


def _say(what):
    if what not in _said:
        _said.add(what)
        print(f"kernels: {what}", file=sys.stderr)


def check(condition, message):
    """ValueError(message) unless condition; message is a function, so that it costs nothing when all is well."""
    if not condition:
        raise ValueError(message())
