"""Where the time goes: encode, transformer, decode and the whole, plain against fast, and against diffusers.

    python -m lab.bench                                              # official configs under seeded weights, 128 → 512
    python -m lab.bench --device cuda --dtype bf16 --variants plain,fast,graphs --vs compiled
    python -m lab.bench --model sana-600m-512 --size 1024
    python -m lab.bench --vs diffusers --json results.json           # the same weights in diffusers' classes, eager
    python -m lab.bench --vs compiled                                # and under torch.compile
    python -m lab.bench --size 4096 --dtype bf16 --variants fast     # in tiles, as eval.py restores large pictures
    python -m lab.bench --rewrites --size 256                        # fast, and fast without each of its rewrites
    python -m lab.bench --variants fast --blocks 16 --batch 8        # fast only; a transformer pruned to 16 blocks

All variants are in one process and take turns on the same inputs. "error" compares what a variant has after a stage
with the first variant's, through all its own stages. Text is 300 random states: the text encoder is not part of it, and
the fast path keeps what depends on it alone. On a CPU the time is the process's CPU seconds on --threads threads (1:
then another program on the machine does not count), otherwise wall time.
"share" is the plain path's multiplications by that time over what one large matrix product reaches (a rewrite that
needs fewer may pass 100 %); "own", with --floor, is the same of the variant's own multiplications. fp32 at 512 takes
about half a minute a variant and run on one core. "peak GB" is with all variants loaded, on a CPU the whole process's.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import fast
from photos.pictures import write_bytes
from runs import DTYPES, UserError, command, cpu_name
from sanasr import DCAE, LinearDiT, SanaSR, one_step, tiled

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "official_configs"


def seeded(cls, config, dtype, device):
    """`cls` with random weights that keep activations near 1, the same at every call."""
    with torch.device("meta"):
        module = cls(config)
    generator, state = torch.Generator().manual_seed(0), {}
    for key, p in module.state_dict().items():
        x = torch.randn(p.shape, generator=generator)
        x = x / math.sqrt(math.prod(p.shape[1:])) if p.ndim > 1 else 1 + x / 10 if key.endswith("weight") else x / 50
        state[key] = x.to(device, dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def shared(module):
    """A copy with modules of its own and the same tensors."""
    return deepcopy(module, {id(p): p for p in module.parameters()})


class Ours:
    """The three stages as functions of one tensor each."""

    def __init__(self, vae, dit, text, timestep, scale):
        self.vae, self.dit, self.text, self.timestep, self.scale = vae, dit, text, timestep, scale

    def encode(self, x):
        return self.scale * self.vae.encode(x)

    def transform(self, z):
        c, mask = (y.expand(len(z), *y.shape[1:]) for y in self.text)
        t = torch.full((len(z),), self.timestep, device=z.device)
        return one_step(self.dit, z, t, c, mask).to(z.dtype)

    def decode(self, z):
        return self.vae.decode(z / self.scale)


class Diffusers(Ours):
    """diffusers' AutoencoderDC and SanaTransformer2DModel with the weights of `ours`, as they come, or compiled."""

    def __init__(self, ours, compiled=False):
        try:
            from diffusers import AutoencoderDC, SanaTransformer2DModel
        except ImportError as error:
            raise UserError(f"--vs diffusers needs the package diffusers ({error}); pip install diffusers transformers")
        with torch.device("meta"):
            vae = AutoencoderDC.from_config({k: v for k, v in ours.vae.config.items() if k[0] != "_"})
            dit = SanaTransformer2DModel.from_config({k: v for k, v in ours.dit.config.items() if k[0] != "_"})
        for theirs, mine in ((vae, ours.vae), (dit, ours.dit)):
            theirs.load_state_dict(mine.state_dict(), strict=True, assign=True)
            theirs.eval().requires_grad_(False)
        if compiled:
            torch._inductor.config.freezing = True  # weights as constants: prepacked on a CPU
            vae.encode, vae.decode, dit = (torch.compile(f) for f in (vae.encode, vae.decode, dit))
        super().__init__(vae, dit, ours.text, ours.timestep, ours.scale)

    def encode(self, x):
        return self.scale * self.vae.encode(x, return_dict=False)[0]

    def transform(self, z):
        c, mask = (y.expand(len(z), *y.shape[1:]) for y in self.text)
        t = torch.full((len(z),), self.timestep, device=z.device)
        f = self.dit(z, encoder_hidden_states=c, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]
        return z - self.timestep / 1000 * f

    def decode(self, z):
        return self.vae.decode(z / self.scale, return_dict=False)[0]


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def timed(f, x, clock, device):
    """(f(x), its seconds, the peak of memory in bytes while it ran: of the process on Linux, of the GPU on CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    synchronize(device)
    start = clock()
    y = f(x)
    synchronize(device)
    seconds = clock() - start
    if device.type == "cuda":
        return y, seconds, torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return y, seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])
    return y, seconds, None


def matmul_peak(dtype, device, clock):
    """Multiply-accumulates a second of a product of two large square matrices, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return n**3 / min(timed(a.matmul, b, clock, device)[1] for _ in range(5))


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


STAGES = dict(encode=dict(down=32), transform={}, decode=dict(up=32))  # and how the sides of a tile change


def stages(variant, tile):
    """(name, function of one tensor) of each stage, in tiles where the picture is larger than `tile` (of latents)."""
    for stage, sides in STAGES.items():
        yield stage, partial(tiled, getattr(variant, stage), tile=tile, overlap=min(SanaSR.OVERLAP, tile // 4), **sides)


def multiplications(variant, x, tile=math.inf):
    """{stage: multiply-accumulates of the variant for x, "sum": of all}."""
    counts, y = {}, x
    for stage, f in stages(variant, tile):
        with FlopCounterMode(display=False) as counter:
            y = f(y.to(x.dtype))
        counts[stage] = counter.get_total_flops() / 2
    return counts | dict(sum=sum(counts.values()))


def measure(variants, x, runs, tile, clock, device):
    """[{variant, stage, p50, p95, peak, error}], the variants taking turns; `error` is relative to the first."""
    times, peaks, errors, results = {}, {}, {}, {}
    for _ in range(runs):
        for name, variant in variants.items():
            total, y = 0.0, x
            for stage, f in stages(variant, tile):
                y, seconds, peak = timed(f, y.to(x.dtype), clock, device)  # blended tiles are in float32
                first = results.setdefault(stage, y)
                times.setdefault((name, stage), []).append(seconds)
                peaks[name, stage] = max(peak or 0, peaks.get((name, stage), 0)) or None
                errors[name, stage] = errors[name, "sum"] = relative(y, first)
                total += seconds
            times.setdefault((name, "sum"), []).append(total)
    return [dict(variant=name, stage=stage, p50=quantile(t, 0.5), p95=quantile(t, 0.95), runs=len(t),
                 peak=peaks.get((name, stage)), error=errors[name, stage]) for (name, stage), t in times.items()]


def show(rows, variants):
    first = next(iter(variants))
    base = {row["stage"]: row["p50"] for row in rows if row["variant"] == first}
    print(f"{'variant':12}{'stage':11}{'p50 s':>9}{'p95 s':>9}{first + ' / it':>16}{'share':>8}"
          f"{'own':>6}{'peak GB':>9}{'error':>9}")
    for row in rows:
        stage = row["stage"]
        own = f"{row['own']:6.0%}" if row["own"] else f"{'':6}"
        peak_gb = f"{row['peak'] / 1e9:9.2f}" if row["peak"] else f"{'':9}"
        print(f"{row['variant']:12}{stage:11}{row['p50']:9.3f}{row['p95']:9.3f}{base[stage] / row['p50']:15.2f}×"
              f"{row['share']:8.0%}{own}{peak_gb}{row['error']:9.1e}")


@torch.inference_mode()
@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name of `python -m weights`; by default the official configs "
                                        "under seeded weights")
    parser.add_argument("--size", type=int, default=512, help="side of the result in pixels, a multiple of 32")
    parser.add_argument("--tile", type=int, default=32 * SanaSR.TILE, metavar="PX", help="the largest side that the "
                        "networks see at once, as in eval.py; 0: no limit (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="timed calls of each variant (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--blocks", type=int, metavar="N", help="keep N blocks of the transformer, as pruning does")
    parser.add_argument("--variants", default="plain,fast", metavar="LIST", help="of ours: plain, fast, inductor, "
                        "which is plain under torch.compile, and on CUDA graphs, which is fast with CUDA graphs "
                        "(default: plain,fast)")
    parser.add_argument("--vs", choices=["diffusers", "compiled"], help="diffusers eager, or that and compiled")
    parser.add_argument("--rewrites", nargs="?", const=",".join([*fast.REWRITES, "dit"]), metavar="LIST",
                        help="the fast path, then the same without each of these (default: all)")
    parser.add_argument("--keep-memory", action="store_true", help="as eval.py does on a CPU (Linux): memory that a "
                        "tensor leaves stays with the process; for all variants")
    parser.add_argument("--floor", action="store_true", help="count every variant's own multiplications, by one more "
                        "call")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there, too")
    args = parser.parse_args(argv)
    device, dtype, names = torch.device(args.device), DTYPES[args.dtype], args.variants.split(",")
    if args.size < 32 or args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of 32")
    if args.tile < 0:
        raise UserError(f"--tile {args.tile} is negative")
    if unknown := set(names) - {"plain", "fast", "graphs", "inductor"}:
        raise UserError(f"--variants {args.variants}: no variant is called {', '.join(sorted(unknown))!r}")
    if "graphs" in names and device.type != "cuda":
        raise UserError("--variants graphs needs --device cuda")
    if args.rewrites:
        names = ["fast"]
        if unknown := set(args.rewrites.split(",")) - {*fast.REWRITES, "dit"}:
            raise UserError(f"--rewrites {args.rewrites}: no rewrite is called {', '.join(sorted(unknown))!r}")

    torch.set_num_threads(args.threads)
    if args.keep_memory:
        fast.keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.backends.cudnn.allow_tf32 = False  # fp32 as in a matrix product's default
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    if args.model:
        model = SanaSR.from_pretrained(args.model, device, dtype)
        vae, dit, timestep = model.vae, model.dit, model.timestep
    else:
        vae, dit = (seeded(cls, json.loads((CONFIGS / f"{part}.config.json").read_text()), dtype, device)
                    for cls, part in ((DCAE, "vae"), (LinearDiT, "transformer")))
        timestep = 900.0
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(1, 300, dit.config["caption_channels"], generator=generator).to(device, dtype)
    text = c, torch.ones(1, 300, device=device, dtype=torch.long)
    x = (torch.rand(args.batch, 3, args.size, args.size, generator=generator) * 2 - 1).to(device, dtype)

    scale = vae.config["scaling_factor"]
    if args.blocks:
        dit.transformer_blocks = dit.transformer_blocks[:args.blocks]
        dit.config["num_layers"] = len(dit.transformer_blocks)
    plain, variants = Ours(vae, dit, text, timestep, scale), {}
    if args.vs:
        variants["diffusers"] = Diffusers(plain)
    if args.vs == "compiled":
        variants["compiled"] = Diffusers(plain, compiled=True)
    if "plain" in names:
        variants["plain"] = plain
    if "inductor" in names:
        variants["inductor"] = compiled = Ours(shared(vae), shared(dit), text, timestep, scale)
        for stage in STAGES:
            setattr(compiled, stage, torch.compile(getattr(compiled, stage)))
    for name, graphs in (("fast", False), ("graphs", True)):
        if name in names:
            variants[name] = Ours(fast.optimise_vae(shared(vae), graphs=graphs),
                                  fast.optimise_dit(shared(dit), graphs), text, timestep, scale)
    for name in filter(None, (args.rewrites or "").split(",")):
        others = [other for other in fast.REWRITES if other != name]
        variants[f"no {name}"] = Ours(fast.optimise_vae(shared(vae), others),
                                      dit if name == "dit" else variants["fast"].dit, text, timestep, scale)
    tile = math.ceil(args.tile / 32) or math.inf
    counted = Ours(shared(vae).to("meta"), shared(dit).to("meta"), [v.to("meta") for v in text], timestep, scale)
    del plain, vae, dit  # the memory of a variant that is not measured would count, too

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    setup = dict(device=name, threads=args.threads if device.type == "cpu" else None, torch=torch.__version__,
                 dtype=args.dtype, size=args.size, batch=args.batch, model=args.model or "official configs, seeded",
                 clock="process CPU seconds" if clock is time.process_time else "wall seconds")
    print(", ".join(f"{key} {value}" for key, value in setup.items()), flush=True)
    first = []
    for name, variant in variants.items():  # first calls cost more: of an operator, and on a GPU or compiled of a size
        small = device.type == "cpu" and name not in ("compiled", "inductor")
        start = time.perf_counter()
        first += measure({name: variant}, x[:, :, :64, :64] if small else x, 1, tile, clock, device)
        if name in ("compiled", "inductor"):
            print(f"{name}: first call {time.perf_counter() - start:.0f} s of wall time")
    macs = multiplications(counted, x.to("meta"))
    own = {name: multiplications(variant, x, tile) for name, variant in variants.items()} if args.floor else {}
    peak = matmul_peak(dtype, device, clock)
    rows = measure(variants, x, args.runs, tile, clock, device)
    for row, before in zip(rows, first, strict=True):
        if row["peak"]:
            row["peak"] = max(row["peak"], before["peak"])  # a graph takes its memory at the first call
    for row in rows:
        row["share"] = macs[row["stage"]] / row["p50"] / peak
        row["own"] = own[row["variant"]][row["stage"]] / row["p50"] / peak if own else None
    print(f"one large matrix product: {peak / 1e9:.1f} GMAC/s")
    show(rows, variants)
    if args.json:
        write_bytes(args.json, json.dumps(setup | dict(peak_gmac_per_s=peak / 1e9, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
