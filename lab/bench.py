"""Where the time goes: encode, transformer, decode and the whole, plain against fast, and against diffusers.

    python -m lab.bench                                              # official configs under seeded weights, 128 → 512
    python -m lab.bench --device cuda --dtype bf16 --variants plain,fast,graphs --vs compiled
    python -m lab.bench --model sana-600m-512 --size 1024 --json results.json
    python -m lab.bench --size 4096 --dtype bf16 --variants fast     # in tiles, as eval.py restores large pictures
    python -m lab.bench --rewrites --size 256                        # fast, and fast without each of its rewrites

All variants are in one process and take turns on the same inputs. "error" compares what a variant has after a stage
with the first variant's, through all its own stages. Text is 300 random states: the text encoder is not part of it, and
the fast path keeps what depends on it alone. On a CPU the time is the process's CPU seconds on --threads threads (1:
then another program on the machine does not count), otherwise wall time.
"share" is the plain path's multiplications by that time over what one large matrix product reaches (a rewrite that
needs fewer may pass 100 %); "own", with --floor, is the same of the variant's own multiplications. fp32 at 512 takes
about half a minute a variant and run on one core. "peak GB" is with all variants loaded, on a CPU the whole process's.
"""
import json
import math
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import fast
import runs
from kernels.timer import machine, timed
from lab.stability import relative
from photos.pictures import one_line, write_bytes
from photos.restorer import tiled
from runs import DTYPES, UserError, command, set_flags
from sanasr import DCAE, DiTBlock, EfficientViTBlock, LinearDiT, ResBlock, SanaSR, one_step

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "official_configs"


def seeded(cls, config, dtype, device):
    """`cls` with random weights that keep activations near 1, the same at every call."""
    with torch.device("meta"):
        module = cls(config)
    generator, state = torch.Generator(device).manual_seed(0), {}  # on a GPU other values, within a second
    for key, p in module.state_dict().items():
        x = torch.randn(p.shape, generator=generator, device=device)
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


def diffusers(ours, mode=None):
    """diffusers' AutoencoderDC and SanaTransformer2DModel with the weights of `ours`, as they come, or compiled.

    mode: of torch.compile, None for eager.
    """
    try:
        from diffusers import AutoencoderDC, SanaTransformer2DModel
    except ImportError as error:
        raise UserError(f"--vs diffusers needs the package diffusers ({error}); pip install diffusers transformers")
    modules = []
    for cls, mine in ((AutoencoderDC, ours.vae), (SanaTransformer2DModel, ours.dit)):
        with torch.device("meta"):
            modules.append(cls.from_config({k: v for k, v in mine.config.items() if k[0] != "_"}))
        modules[-1].load_state_dict(mine.state_dict(), strict=True, assign=True)
        modules[-1].eval().requires_grad_(False)
    functions = modules[0].encode, modules[0].decode, modules[1]
    if mode:
        torch._inductor.config.freezing = True  # weights as constants: prepacked on a CPU
        functions = (torch.compile(f, mode=mode) for f in functions)
    encode, decode, dit = (partial(f, return_dict=False) for f in functions)
    vae = SimpleNamespace(encode=lambda x: encode(x)[0], decode=lambda z: decode(z)[0])
    return Ours(vae, lambda z, t, c, mask: dit(z, c, timestep=t, encoder_attention_mask=mask)[0], ours.text,
                ours.timestep, ours.scale)


VARIANTS = "plain", "fast", "graphs", "inductor", "regional"
REWRITES = *fast.REWRITES, "dit"
STAGES = dict(encode=dict(down=32), transform={}, decode=dict(up=32))  # and how the sides of a tile change


def through(variant, x, tile, measure):
    """Yields (stage, its result, what `measure` says of it), in tiles where the picture is larger than `tile` latents.

    measure: a function without arguments -> (its result, …).
    """
    dtype = x.dtype
    for stage, sides in STAGES.items():
        overlap = min(SanaSR.OVERLAP, tile // 4)
        x, *found = measure(partial(tiled, getattr(variant, stage), x.to(dtype), tile=tile, overlap=overlap, **sides))
        yield stage, x, found  # blended tiles are in float32


def multiplications(variant, x, tile=math.inf):
    """{stage: multiply-accumulates of the variant for x, "sum": of all}."""
    def counted(call):
        with FlopCounterMode(display=False) as counter:
            y = call()
        return y, counter.get_total_flops() / 2
    counts = {stage: count for stage, _, (count,) in through(variant, x, tile, counted)}
    return counts | dict(sum=sum(counts.values()))


def measure(variants, x, runs, tile, clock, warm=0):
    """[{variant, stage, p50, p95, peak, error}], the variants taking turns; `error` is relative to the first.

    warm: turns before those that are timed. A variant that fails is taken out of `variants`, and a line says why.
    """
    rows, results, timer = {}, {}, partial(timed, device=x.device, clock=clock)
    for turn in range(-warm, runs):
        for name, variant in list(variants.items()):
            try:
                for stage, y, ((seconds,), peak) in through(variant, x, tile, timer):
                    row = rows.setdefault((name, stage), dict(variant=name, stage=stage, times=[], peak=0))
                    row["error"] = relative(y, results.setdefault(stage, y))
                    row["peak"] = max(peak or 0, row["peak"])  # a graph takes its memory at first
                    row["times"].append(seconds)
            except Exception as error:  # a rival that does not run must not cost the others' rows
                print(f"{name}: left out, {type(error).__name__}: {one_line(error)[:300]}", file=sys.stderr)
                del variants[name]
                continue
            if turn == -warm < 0:
                print(f"{name}: first call {sum(rows[name, s]['times'][0] for s in STAGES):.1f} s", flush=True)
    found = []
    for name in variants:
        stages = [dict(rows[name, stage], times=rows[name, stage]["times"][warm:]) for stage in STAGES]
        whole = [sum(times) for times in zip(*(row["times"] for row in stages), strict=True)]
        found += [*stages, dict(stages[-1], stage="sum", times=whole, peak=0)]
    for row in found:
        row["p50"], row["p95"] = (sorted(row["times"])[math.ceil(q * runs) - 1] for q in (0.5, 0.95))
    return found


def profiled(variant, x, tile):
    """One line: kernels, launches, and the share of the time in which the GPU has work."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        list(through(variant, x, tile, lambda call: (call(),)))
        torch.cuda.synchronize()
    events = profile.events()
    on_gpu = [e.time_range for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum("LaunchKernel" in e.name or "GraphLaunch" in e.name for e in events)
    busy, whole = sum(t.elapsed_us() for t in on_gpu), max(t.end for t in on_gpu) - min(t.start for t in on_gpu)
    return f"{len(on_gpu)} kernels in {launches} launches, {busy / 1e3:.2f} ms of {whole / 1e3:.2f} ms busy"


def show(rows):
    base = {row["stage"]: row["p50"] for row in rows if row["variant"] == rows[0]["variant"]}
    print(f"{'variant':16}{'stage':11}{'p50 s':>9}{'p95 s':>9}{rows[0]['variant'] + ' / it':>16}{'share':>8}"
          f"{'own':>6}{'peak GB':>9}{'error':>9}")
    for row in rows:
        own = f"{row['own']:6.0%}" if row["own"] else f"{'':6}"
        peak_gb = f"{row['peak'] / 1e9:9.2f}" if row["peak"] else f"{'':9}"
        print(f"{row['variant']:16}{row['stage']:11}{row['p50']:9.4f}{row['p95']:9.4f}"
              f"{base[row['stage']] / row['p50']:15.2f}×{row['share']:8.0%}{own}{peak_gb}{row['error']:9.1e}")


def parse(argv):
    """-> arguments. Raises UserError."""
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("--model", help="a folder or a name of `python -m weights` (default: official configs, seeded weights)")
    add("--size", type=int, default=512, help="side of the result in pixels, a multiple of 32")
    add("--tile", type=int, default=32 * SanaSR.TILE, help="as in eval.py, in pixels; 0: no limit")
    add("--batch", type=int, default=1, help="pictures at a time")
    add("--runs", type=int, default=3, help="timed calls of each variant")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--threads", type=int, default=1, help="on a CPU")
    add("--blocks", type=int, help="keep so many blocks of the transformer, as pruning does")
    add("--variants", default="plain,fast", help="of plain, fast, inductor (plain under torch.compile), regional (its "
        "blocks are) and, on CUDA, graphs, which is fast with CUDA graphs")
    add("--vs", choices=["diffusers", "compiled"], help="diffusers eager, or that and compiled, also with graphs")
    add("--rewrites", nargs="?", const=",".join(REWRITES), help="the fast path, then the same without each of these")
    add("--keep-memory", action="store_true", help="for all variants what eval.py does on a CPU, fast.keep_memory")
    add("--floor", action="store_true", help="count every variant's own multiplications, by one more call")
    add("--profile", action="store_true", help="on CUDA: kernels, launches and idle time of each variant")
    add("--json", type=Path, help="a file: write every number there, too")
    args = parser.parse_args(argv)
    args.device, args.rewrites = torch.device(args.device), args.rewrites.split(",") if args.rewrites else []
    args.variants = ["fast"] if args.rewrites else args.variants.split(",")
    if args.size < 32 or args.size % 32 or args.tile < 0:
        raise UserError(f"--size {args.size} is not a multiple of 32, or --tile {args.tile} is negative")
    for option, given, known in (("variant", args.variants, VARIANTS), ("rewrite", args.rewrites, REWRITES)):
        if unknown := set(given) - {*known}:
            raise UserError(f"--{option}s: no {option} is called {', '.join(sorted(unknown))!r}")
    if args.device.type != "cuda" and ("graphs" in args.variants or args.profile):
        raise UserError("--variants graphs and --profile need --device cuda")
    return args


def build(args, dtype):
    """{name: variant} of what the arguments ask for, and the plain one on the meta device, for counting."""
    if args.model:
        model = SanaSR.from_pretrained(args.model, args.device, dtype)
        vae, dit, timestep = model.vae, model.dit, model.timestep
    else:
        vae, dit = (seeded(cls, json.loads((CONFIGS / f"{part}.config.json").read_text()), dtype, args.device)
                    for cls, part in ((DCAE, "vae"), (LinearDiT, "transformer")))
        timestep = 900.0
    c = torch.randn(1, 300, dit.config["caption_channels"], generator=torch.Generator().manual_seed(1))
    text = c.to(args.device, dtype), torch.ones(1, 300, device=args.device, dtype=torch.long)
    if args.blocks:
        dit.transformer_blocks = dit.transformer_blocks[:args.blocks]
        dit.config["num_layers"] = len(dit.transformer_blocks)
    scale, variants = vae.config["scaling_factor"], {}
    ours = partial(Ours, text=text, timestep=timestep, scale=scale)
    plain = ours(vae, dit)
    if args.vs:
        modes = {"diffusers": None, "compiled": "default", "compiled graphs": "reduce-overhead"}
        count = 1 if args.vs == "diffusers" else 3 if args.device.type == "cuda" else 2
        variants = {name: diffusers(plain, modes[name]) for name in list(modes)[:count]}
    for name in args.variants:
        variants[name] = new = plain if name == "plain" else ours(shared(vae), shared(dit))
        if name == "inductor":
            for stage in STAGES:
                setattr(new, stage, torch.compile(getattr(new, stage)))
        elif name == "regional":
            for module in (*new.vae.modules(), *new.dit.modules()):
                if isinstance(module, ResBlock | EfficientViTBlock | DiTBlock):
                    module.compile()
        elif name != "plain":
            graphs = name == "graphs"
            new.vae, new.dit = fast.optimise_vae(new.vae, graphs=graphs), fast.FastDiT(new.dit, graphs)
    for name in args.rewrites:
        others = [other for other in fast.REWRITES if other != name]
        variants[f"no {name}"] = ours(fast.optimise_vae(shared(vae), others),
                                      dit if name == "dit" else variants["fast"].dit)
    return variants, ours(shared(vae).to("meta"), shared(dit).to("meta"), text=[v.to("meta") for v in text])


@torch.inference_mode()
@command
def main(argv=None):
    args = parse(argv)
    device, dtype, tile = args.device, DTYPES[args.dtype], math.ceil(args.tile / 32) or math.inf
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        fast.keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    set_flags()
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    variants, plain = build(args, dtype)
    generator = torch.Generator().manual_seed(2)
    x = (torch.rand(args.batch, 3, args.size, args.size, generator=generator) * 2 - 1).to(device, dtype)
    setup = dict(device=machine(device), threads=args.threads if device.type == "cpu" else None,
                 torch=torch.__version__, dtype=args.dtype, size=args.size, batch=args.batch,
                 model=args.model or "official configs, seeded",
                 clock="process CPU seconds" if clock is time.process_time else "seconds")
    print(", ".join(f"{key} {value}" for key, value in setup.items()), flush=True)
    if device.type == "cpu":  # the first call of an operator costs more
        measure(variants, x[:, :, :64, :64], 1, tile, clock)
    macs = multiplications(plain, x.to("meta"))
    own = {name: multiplications(variant, x, tile) for name, variant in variants.items()} if args.floor else {}
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    peak = n**3 / min(timed(partial(a.matmul, b), device, 5, clock)[1])
    compiled = {"inductor", "regional"} & {*args.variants} or args.vs == "compiled"
    rows = measure(variants, x, args.runs, tile, clock, 3 if device.type == "cuda" else int(bool(compiled)))
    if not rows:
        raise UserError("no variant could run")
    for row in rows:
        row["share"] = macs[row["stage"]] / row["p50"] / peak
        row["own"] = own[row["variant"]][row["stage"]] / row["p50"] / peak if own else None
    print(f"one large matrix product: {peak / 1e9:.1f} GMAC/s")
    show(rows)
    if args.json:
        write_bytes(args.json, json.dumps(setup | dict(peak_gmac_per_s=peak / 1e9, rows=rows), indent=1) + "\n")
    for name, variant in variants.items() if args.profile else ():
        print(f"{name}: {profiled(variant, x, tile)}", flush=True)


if __name__ == "__main__":
    main()
