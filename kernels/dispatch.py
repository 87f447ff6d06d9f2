"""Which implementation runs: Triton where it can, PyTorch everywhere else, and why."""

import os
import sys

import torch

try:
    import triton
    import triton.language as tl

except ImportError:  # PyTorch for macOS comes without it. The kernel files must still import, for their references.
    triton = tl = None

BACKENDS = ("auto", "torch", "triton")
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides at import, so do we

# Sizes that change from picture to picture. Triton compiles a kernel anew where an integer is 1 or starts or ceases to
# be a multiple of 16, unless it is named here; strides, hidden and channels stay, for their alignment makes loads wide.
SIZES = ["N", "tokens", "S", "B", "heads", "height", "width", "rows", "across", "tiles", "n"]


def jit(function):
    """triton.jit, where Triton is installed, without variants for the integers in SIZES."""
    return triton.jit(function, do_not_specialize=SIZES) if triton else function


_wish = os.environ.get("SANASR_KERNELS", "auto")
_said = set()


def set_backend(name):
    """Choose for all later calls: "auto" (Triton where it can run), "torch", or "triton" (as auto, but says why where
    it cannot). Returns the choice before. The environment variable SANASR_KERNELS sets the initial one.

    Raises ValueError for any other name."""
    global _wish
    check(name in BACKENDS, lambda: f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _wish = _wish, name
    return before


def device_obstacle(kind, index=None):
    """Why Triton cannot run on a device of this kind ("cuda", "cpu", ...), in words, or None where it can."""
    if triton is None:
        return "triton is not installed"
    if INTERPRET:
        return None  # on any device
    if kind != "cuda":
        return f"the tensors are on {kind} and the kernels need an NVIDIA GPU"
    if torch.version.cuda is None:
        return "the kernels are built and checked for NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"the GPU's compute capability {major}.{minor} is below 8.0"


# torch.compiler.assume_constant_result sets this mark as well, but imports torch._dynamo for it, which takes seconds
device_obstacle._dynamo_marked_constant = True


def use_triton(tensor, backend=None, obstacle=None):
    """True where the Triton kernel is to run on `tensor`.

    backend: the caller's argument. None follows SANASR_KERNELS and falls back to PyTorch where Triton cannot run;
    "triton" raises ValueError there instead. obstacle: the operator's own reason against Triton, or None.
    On a GPU, and wherever SANASR_KERNELS asks for Triton, stderr tells the choice and its reason, once for each reason.
    """
    wish = _wish if backend is None else backend
    where = "SANASR_KERNELS" if backend is None else "backend"
    check(wish in BACKENDS, lambda: f"{where} must be one of {', '.join(BACKENDS)}, got {wish!r}")
    if wish == "torch":
        reason = f'{where} is "torch"'
    else:
        reason = device_obstacle(tensor.device.type, tensor.device.index) or obstacle
        check(reason is None or backend != "triton", lambda: f'backend="triton" is not possible: {reason}')
    if (tensor.is_cuda or _wish == "triton") and not torch.compiler.is_compiling():
        line = f"kernels: PyTorch, since {reason}" if reason else "kernels: Triton"
        if line not in _said:
            _said.add(line)
            print(line, file=sys.stderr)
    return reason is None


def check(condition, message):
    """Raise ValueError(message()) unless condition; the message is only made when it is needed."""
    if not condition:
        raise ValueError(message())


def autocast_is_on(tensor):
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # "meta" has no autocast, and asking for it is an error


def check_same(first, **others):
    """Raise ValueError unless the tensors in others (None is skipped) have first's dtype, which must be a floating one,
    and device. Under autocast dtypes may differ, as they may for torch's own operators."""
    check(first.is_floating_point(), lambda: f"need a floating dtype, got {first.dtype}")
    mixed = autocast_is_on(first)
    for name, t in others.items():
        if t is not None:
            check(mixed or t.dtype == first.dtype, lambda: f"{name} is {t.dtype}, the first argument {first.dtype}")  # noqa: B023
            check(t.device == first.device, lambda: f"{name} is on {t.device}, the first argument on {first.device}")  # noqa: B023


def no_gradient(name, *tensors):
    """Raise ValueError where a gradient of the tensors would be needed."""
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    check(not needed, lambda: f"{name} has no gradient: call it under torch.no_grad(), or freeze the weights")


def plain_obstacle(first, *others, contiguous=True):
    """Why a kernel for three dtypes, and for contiguous tensors, cannot take these, in words, or None."""
    for t in (first, *others):
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{t.dtype} is computed by the reference"
        if contiguous and not t.is_contiguous():
            return f"a tensor of shape {tuple(t.shape)} is not contiguous"
    return f"the first tensor is empty, {tuple(first.shape)}" if first.numel() == 0 else None


def launch(kernel, grid, first, *args, **constants):
    """kernel[grid](first, *args, **constants) on the device of `first`: Triton launches on the current device."""
    with torch.cuda.device(first.get_device()):
        kernel[grid](first, *args, **constants)
