"""Check the kernels against float64, then measure them at this project's sizes.

    python -m kernels.bench [--op NAME] [--dtype bf16|fp16|fp32] [--check] [--no-compile] [--json FILE]

NAME: one of OPS; all without it.

On a GPU: milliseconds at the 20th, 50th and 80th percentile for eager PyTorch, torch.compile and Triton, each replayed
from a CUDA graph with inputs as warm as the L2 cache keeps them; the rates, and what part they are of this card's own
copy (at the same number of bytes) and matrix product; the peak of memory beyond the inputs. About 15 minutes for all,
most of it compiling. On a CPU: the PyTorch fallback alone, batch 1, up to 4096 tokens, in about a minute.

MB, GFLOP and the floors are counted, not measured: what the kernels must move, each input read and each result written
once, and for each operation the longer of its bytes and its matrix products at the rates of CARDS, those of bf16.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

import torch

import kernels
import runs
from fast.graphs import record
from kernels.dispatch import device_obstacle, triton
from kernels.timer import machine, timed
from photos.pictures import write_bytes
from runs import DTYPES, command

# bytes/s and bf16 FLOP/s, for the floors
CARDS = {"H200": (4.3e12, 790e12), "H100": (3.35e12, 790e12), "4090": (1.0e12, 165e12)}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

# (where, batch, height = width in tokens, heads, C, H). SANA's LinearDiT at 512 to 4096 px; the DC-AE's EfficientViT
# blocks at 512 px, whose multi-scale attention has twice the heads of C / 32.
SIZES = [(f"DiT {32 * s}px", b, s, 36, 1152, 2880) for b in (1, 8) for s in (16, 32, 64, 128)]
VIT = ((512, 64), (1024, 32), (1024, 16))
SIZES += [(f"DC-AE {C}x{s}x{s}", b, s, C // 16, C, 4 * C) for b in (1, 8) for C, s in VIT]
QKV = [(f"DC-AE {3 * C}x{s}x{s}", b, s, 0, 3 * C, 0) for b in (1, 8) for C, s in VIT]
RES = [(f"DC-AE {C}x{s}x{s}", b, s, 0, C, 0) for b in (1, 8) for C, s in ((128, 512), (256, 256), (512, 128))]
UP = [(f"DC-AE {C}x{s}x{s}", b, s, 0, C, H) for b in (1, 8) for C, H, s in
      ((256, 128, 256), (512, 256, 128), (512, 512, 64), (1024, 512, 32), (1024, 1024, 16))]


@dataclass
class Operator:
    """What is measured, at the sizes (where, B, side, heads, C, H); N = B · side² tokens, `size` bytes a value.

    operations, backward: [(bytes, FLOP of matrix products)] of what one pass does in turn.
    """
    sizes: list
    inputs: Callable  # (draw, B, side, heads, C, H) -> tensors; draw: shape -> unit-normal values
    run: Callable  # (backend, side, *tensors)
    operations: Callable  # (N, heads, C, H, size)
    backward: Callable | None = None  # the same

    def counts(self, B, side, heads, C, H, size, backward):
        N = B * side * side
        found = self.operations(N, heads, C, H, size)
        return found + self.backward(N, heads, C, H, size) if backward else found


def product(rows, inner, columns, size):
    return (rows * inner + inner * columns + rows * columns) * size, 2 * rows * inner * columns


def ffn_products(N, C, H, size):
    return [product(N, C, 2 * H, size), product(N, H, C, size)]


def repeats(x, bias):
    """Of join_up_block: no shortcut where the channels do not fit."""
    return {len(bias): 4, 2 * len(bias): 2, 4 * len(bias): 1}.get(x.shape[3], 0)


OPS = {
    "linear_attention": Operator(  # q, k, v: slices of one projection, as the models have them
        SIZES, lambda draw, B, side, heads, C, H: draw(B, side * side, 3, heads, 32).unbind(2),
        lambda backend, side, *t: kernels.linear_attention(*t, backend=backend),
        lambda N, heads, C, H, size: [(4 * N * heads * 32 * size, 4 * N * heads * 32 * 32)],
        lambda N, heads, C, H, size: [(7 * N * heads * 32 * size, 10 * N * heads * 32 * 32)]),
    "depthwise_gate": Operator(
        SIZES, lambda draw, B, side, heads, C, H: [draw(B, side * side, 2 * H), draw(2 * H, 1, 3, 3), draw(2 * H)],
        lambda backend, side, u, *t: kernels.depthwise_gate(u, side, side, *t, backend=backend),
        lambda N, heads, C, H, size: [(3 * N * H * size, 0)],
        lambda N, heads, C, H, size: [(11 * N * H * size, 0)]),
    "mix_ffn": Operator(
        SIZES, lambda draw, B, side, heads, C, H: [
            draw(B, side * side, C), draw(2 * H, C, 1, 1) * C**-0.5, draw(2 * H), draw(2 * H, 1, 3, 3), draw(2 * H),
            draw(C, H, 1, 1) * H**-0.5],
        lambda backend, side, x, *t: kernels.mix_ffn(x, side, side, *t, backend=backend),
        lambda N, heads, C, H, size: [*ffn_products(N, C, H, size), (3 * N * H * size, 0)],
        # the gradients of a product are two more of its size
        lambda N, heads, C, H, size: [*2 * ffn_products(N, C, H, size), (11 * N * H * size, 0)]),
    "add_layer_norm_": Operator(
        SIZES[:8], lambda draw, B, side, heads, C, H: [*(draw(B, side * side, C) for _ in "xy"), *draw(3, C)],
        lambda backend, side, *t: kernels.add_layer_norm_(*t, 1e-6, backend=backend),
        lambda N, heads, C, H, size: [(4 * N * C * size, 0)]),
    "depthwise": Operator(
        QKV, lambda draw, B, side, heads, C, H: [draw(B, side * side, C), draw(C, 1, 5, 5)],
        lambda backend, side, u, weight: kernels.depthwise(u, side, side, weight, backend=backend),
        lambda N, heads, C, H, size: [(2 * N * C * size, 0)]),
    "add_rms_norm_": Operator(
        RES, lambda draw, B, side, heads, C, H: [*(draw(B, side * side, C) for _ in "xy"), draw(C), draw(C)],
        lambda backend, side, *t: kernels.add_rms_norm_(*t, 1e-5, backend=backend),
        lambda N, heads, C, H, size: [(3 * N * C * size, 0)]),
    "bias_silu_": Operator(
        RES, lambda draw, B, side, heads, C, H: [draw(B, side * side, C), draw(C)],
        lambda backend, side, *t: kernels.bias_silu_(*t, backend=backend),
        lambda N, heads, C, H, size: [(2 * N * C * size, 0)]),
    "join_up_block": Operator(
        UP, lambda draw, B, side, heads, C, H: [draw(B, side + 1, side + 1, 4, H), draw(B, side, side, C), draw(H)],
        lambda backend, side, y, x, bias: kernels.join_up_block(y, x, bias, repeats(x, bias), backend=backend),
        lambda N, heads, C, H, size: [(N * (8 * H + C) * size, 0)]),
}


def drawn(op, dtype, device, *case):
    """Inputs of a case; slices stay slices."""
    return list(op.inputs(lambda *shape: torch.randn(shape, device=device, dtype=dtype), *case))


def step(function, inputs, gradient=None):
    """A call without arguments that runs function forward, or with a gradient forward and back to every input."""
    back = gradient is not None
    inputs = [t.detach().requires_grad_() for t in inputs] if back else inputs

    def call():
        with torch.set_grad_enabled(back):
            out = function(*inputs)
            return out.detach(), *(torch.autograd.grad(out, inputs, gradient) if back else ())
    return call


def check(names, dtype, device, backend):
    """{op: largest relative error of any output or gradient against float64}. Ends the program if one is too large."""
    errors, cases = {}, [(1, 1), (2, 5), (1, 17)] + ([(1, 25), (1, 128)] if device == "cuda" else [])
    for name in names:
        op, worst = OPS[name], 0.0
        for B, side in cases:
            torch.manual_seed(0)
            inputs = drawn(op, dtype, device, B, side, 2, 64, 160)
            double = [t.double() for t in inputs]
            gradient = torch.randn_like(op.run("torch", side, *inputs)) if op.backward else None
            got = step(partial(op.run, backend, side), inputs, gradient)()
            expected = step(partial(op.run, "torch", side), double, gradient.double() if op.backward else None)()
            for a, b in zip(got, expected, strict=True):
                error = ((a.double() - b).norm() / max(b.norm().item(), expected[0].norm().item())).item()
                worst = max(worst, error if error == error else float("inf"))
        verdict = "ok" if worst <= TOLERANCE[dtype] else f"FAILED, above {TOLERANCE[dtype]:.0e}"
        print(f"check {name:17} {backend:6} outputs and gradients: relative error {worst:.1e}  {verdict}")
        if worst > TOLERANCE[dtype]:
            sys.exit(1)
        errors[name] = worst
    return errors


def measure(call, device):
    """([ms] of a call at the percentiles 20, 50, 80, and the peak of its memory beyond the inputs in MB, on a GPU).

    On a GPU a graph of up to 20 calls is timed, and divided: launching a graph takes as long as a small kernel.
    """
    call()  # the first call compiles, and chooses algorithms
    if device == "cpu":
        _, (first,), _ = timed(call, device)
        seconds, peak = timed(call, device, repeats=max(3, min(20, int(0.3 / first))))[1], None
    else:
        call()
        before = torch.cuda.memory_allocated()
        _, (first,), peak = timed(call, device)
        peak, calls = (peak - before) / 1e6, max(1, min(20, int(2e-3 / first)))

        def several():
            for _ in range(calls):
                result = call()
            return result
        graph, _ = record(several, [])
        graph.replay()
        seconds = [s / calls for s in timed(graph.replay, device, repeats=50)[1]]
    cuts = quantiles(seconds, n=10, method="inclusive")
    return [1e3 * cuts[i] for i in (1, 4, 7)], peak


def card_rates(dtype, sizes):
    """{bytes: copy rate in bytes/s when this many are read and written}, and FLOP/s of a matrix product."""
    copies = {}
    for n in sizes:
        size, a, b = min(max(2, n), 4 << 30), None, None  # the rate grows no more; the former pair's memory is free
        a = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        copies[n] = size / (measure(lambda: b.copy_(a), "cuda")[0][1] / 1e3)  # noqa: B023
    m = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    return copies, 2 * 8192**3 / (measure(lambda: m @ m, "cuda")[0][1] / 1e3)


def cases(names):
    """(op, size, with the backward pass or without): batch 1 first, every operator before the second size of any."""
    found = [(size[1], i, back, name, size) for name in names for i, size in enumerate(OPS[name].sizes)
             for back in (False, True)[:1 + bool(OPS[name].backward)]]
    return [(name, size, back) for _, _, back, name, size in sorted(found, key=lambda case: case[:3])]


def row_of(name, size, backward, dtype, device, backends, tokens):
    """What the counts say of a case, and what was measured."""
    op, (where, B, side, heads, C, H) = OPS[name], size
    operations = op.counts(B, side, heads, C, H, dtype.itemsize, backward)
    moved, flop = (sum(x) for x in zip(*operations, strict=True))
    floors = {card: 1e3 * sum(max(b / rate, f / peak) for b, f in operations) for card, (rate, peak) in CARDS.items()}
    row = {"op": name, "where": where, "batch": B, "pass": "fwd+bwd" if backward else "fwd", "bytes": moved,
           "flop": flop, "floor_ms": floors, "ms": {}, "peak_mb": {}}
    if side * side > tokens or (device == "cpu" and B > 1):
        return row
    inputs = drawn(op, dtype, device, B, side, heads, C, H)
    gradient = torch.randn_like(op.run("auto", side, *inputs)) if backward else None
    for label, backend in backends.items():
        function = partial(op.run, backend, side)
        if label == "compiled":
            torch.compiler.reset()
            function = torch.compile(function)
        try:
            row["ms"][label], row["peak_mb"][label] = measure(step(function, inputs, gradient), device)
        except torch.OutOfMemoryError:
            print(f"{name}, {where}, batch {B}: not enough memory for {label}", file=sys.stderr)
    return row


def show(row, labels, copies, matmul):
    """One line; what was not measured stays empty."""
    line = f"{row['op']:17}{row['where']:16}{row['batch']:2} {row['pass']:8}"
    line += f"{row['bytes'] / 1e6:8.1f}{row['flop'] / 1e9:8.1f}"
    line += "".join(f"{ms:9.4f}" for ms in row["floor_ms"].values())
    for label in labels:
        ms, peak = row["ms"].get(label), row["peak_mb"].get(label)
        line += " |" + (" ".join(f"{t:9.4f}" for t in ms) if ms else " " * 29)
        line += f"{peak:8.0f}" if peak is not None else " " * 8
    if row["ms"]:
        *_, last = row["ms"].values()
        rate, speed = row["bytes"] / last[1] * 1e3, row["flop"] / last[1] * 1e3
        line += f" |{rate / 1e9:8.1f}{speed / 1e12:8.2f}"
        if copies:
            line += f"{100 * rate / copies[row['bytes']]:7.0f}%{100 * speed / matmul:7.0f}%"
    print(line, flush=True)


@command
def main(argv=None):
    parser = runs.parser(__doc__)
    parser.add_argument("--op", choices=OPS, help="this one only")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU and fp32 on a CPU, if not given")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    parser.add_argument("--tokens", type=int, metavar="N", help="measure cases of up to N tokens, count the others "
                        "(on a CPU 4096, if not given)")
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    args = parser.parse_args(argv)
    names = [args.op] if args.op else list(OPS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype or ("bf16" if device == "cuda" else "fp32")]
    tokens = args.tokens or (math.inf if device == "cuda" else 4096)
    obstacle = device_obstacle(device, 0)
    backends = {"eager": "torch"}
    if device == "cuda":
        backends.update({} if args.no_compile else {"compiled": "torch"})
        backends.update({} if obstacle else {"Triton": "triton"})
    about = {"device": machine(device), "dtype": str(dtype), "torch": torch.__version__,
             "triton": triton and triton.__version__, "threads": torch.get_num_threads()}
    print("  ".join(f"{k} {v}" for k, v in about.items()))
    if obstacle:
        print(f"No Triton here, since {obstacle}: what is measured is the PyTorch fallback, the rest stays empty.")
    content = {"about": about, "errors": check(names, dtype, device, "torch" if obstacle else "triton"), "rows": []}
    if args.json:
        write_bytes(args.json, json.dumps(content, indent=1))
    if args.check:
        return
    labels = ["eager", "compiled", "Triton"]
    copies, matmul, todo = {}, None, cases(names)
    if device == "cuda":
        counts = [OPS[name].counts(*size[1:], dtype.itemsize, back) for name, size, back in todo]
        copies, matmul = card_rates(dtype, {sum(moved for moved, _ in count) for count in counts})
        print(f"copy {max(copies.values()) / 1e9:.0f} GB/s at best, matrix product {matmul / 1e12:.0f} TFLOP/s")
    content |= {"copy_rate": copies, "matmul_rate": matmul}
    print(f"{'':44}{'MB':>8}{'GFLOP':>8}" + "".join(f"{'floor':>9}" for _ in CARDS), end="")
    print("".join(f" |{label + ' ms: p20, p50, p80':29}{'peak MB':>8}" for label in labels), end="")
    print(f" |{'GB/s':>8}{'TFLOP/s':>8}{'% copy':>8}{'% mm':>8}   (of the last one measured)")
    print(f"{'':60}" + "".join(f"{card:>9}" for card in CARDS))
    for name, size, back in todo:
        content["rows"].append(row_of(name, size, back, dtype, device, backends, tokens))
        show(content["rows"][-1], labels, copies, matmul)
        if args.json:  # after every row: a run that is cut short keeps what it has
            write_bytes(args.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
