"""Every Triton kernel in every configuration, compiled for sm_80, sm_89 and sm_90 without a GPU: no register may spill,
and shared memory must fit the card."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.dispatch import INTERPRET  # noqa: E402
from kernels.linear_attention import (  # noqa: E402
    CONFIG,
    _backward_key_value,
    _backward_query,
    _forward_out,
    _forward_state,
)  # fmt: skip
from kernels.mix_ffn import BLOCK_C, COLS, WARPS, _backward_input, _gate  # noqa: E402

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="the interpreter has replaced the compiler"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"),
]

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block may use (CUDA programming guide, table 24)
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FLOAT32 = ("state", "dstate", "dweight")  # pointers to float32 whatever the inputs are
POINTERS = {"q", "k", "v", "g", "out", "dq", "dk", "dv", "u", "weight", "bias", "dy", "dp", "du", *FLOAT32}


def resources(kernel, dtype, arch, warps, constants, strided=False):
    """(bytes spilled to the stack, bytes of shared memory) of a kernel compiled with 16-byte aligned pointers and row
    strides, and unit channel strides unless strided."""
    signature, constants, hints = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_d") and not strided:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*fp32" if name in FLOAT32 else POINTER[dtype]
            hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name in ("hidden", "channels") or name[-2:] in ("_b", "_n", "_h"):
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return stack_bytes(binary.asm["cubin"]), binary.metadata.shared


def stack_bytes(cubin):
    """Spilled registers lie on the stack, and nothing else of these kernels does."""
    path = Path(triton.knobs.cache.dir) / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def faults(kernel, dtype, arch, warps, constants, strided=False):
    stack, shared = resources(kernel, dtype, arch, warps, constants, strided)
    found = [f"{stack} bytes of registers spilled"] if stack else []
    return found + ([f"{shared} bytes of shared memory, the card has {SHARED[arch]}"] if shared > SHARED[arch] else [])


def attention_constants(kernel, dtype, d, block):
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return dict(D=d, BLOCK=block, PRECISION=precision, **({"DOT": DOT[dtype]} if kernel is _forward_state else {}))


@pytest.fixture(autouse=True)
def cold_cache(tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


ATTENTION = [_forward_state, _forward_out, _backward_query, _backward_key_value]
# fp16 compiles as bf16 does but for the names of the types; head sizes of 32 are those of every model here.
SLOW = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 32, 64])
def test_attention_fits(arch, dtype, d):
    block, warps = CONFIG[d, dtype.itemsize]
    for kernel in ATTENTION:
        found = faults(kernel, dtype, arch, warps, attention_constants(kernel, dtype, d, block))
        assert not found, f"{kernel.__name__}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 32, 64])
def test_attention_fits_with_strided_channels(arch, dtype, d):
    block, warps = CONFIG[d, dtype.itemsize]
    for kernel in ATTENTION:
        found = faults(kernel, dtype, arch, warps, attention_constants(kernel, dtype, d, block), strided=True)
        assert not found, f"{kernel.__name__}: {found}"


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, flag", [(_gate, "BACKWARD"), (_backward_input, "NEED_WEIGHT")])
def test_gate_fits(arch, dtype, kernel, flag):
    for value in (False, True):
        found = faults(kernel, dtype, arch, WARPS, {flag: value, "BLOCK_C": BLOCK_C, "COLS": COLS})
        assert not found, f"{flag}={value}: {found}"


def test_the_check_can_fail():
    """Tiles twice too large spill registers and want more shared memory than an RTX 4090 has."""
    constants = attention_constants(_backward_key_value, torch.float32, 64, 64)
    found = " ".join(faults(_backward_key_value, torch.float32, 89, 8, constants))
    assert "spilled" in found and "shared memory" in found
    assert faults(_gate, torch.bfloat16, 90, 1, {"BACKWARD": True, "BLOCK_C": BLOCK_C, "COLS": 2 * COLS})
