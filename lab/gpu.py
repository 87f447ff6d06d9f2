"""Everything on a GPU in one command, within nine minutes: correctness, speed, memory, training, pruning.

    python -m lab.gpu --out runs/gpu                 on a machine with an NVIDIA GPU; needs no network
    python -m lab.gpu --out runs/gpu --parts bench   only these parts, comma-separated; the others' results are kept
    python -m lab.gpu --out /tmp/x --rehearse        the same code on a CPU: tiny networks, Triton's interpreter

    model      an official folder under seeded weights, of official size but for the text encoder (which no part times)
    kernels    every kernel against float64: outputs, gradients, all dtypes, odd sizes; tests/test_kernels_triton.py
    micro      kernels.bench at SANA's and DC-AE's sizes, bf16: eager PyTorch and Triton
    goldens    the official implementations' outputs in float32, bfloat16 and float16
    bench      lab/bench.py at 512 and 1024, batch 1 and 8, and 4096 in tiles: plain, fast, graphs, Inductor, diffusers
    train      train.py, 512 crops: with and without checkpointing, Triton against the reference's backward
    prune      prune.py: 20 calibration samples
    carried    the bundled model: pictures of the GPU against the CPU's

gpu.json and gpu.md in --out are written anew after every result, so that a run that is cut short keeps what it has.
Each part runs in a process of its own; what a part cannot do is a row that says why.
"""
from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import kernels
from kernels import bench as micro
from kernels.dispatch import device_obstacle, triton
from kernels.linear_attention import linear_attention_reference
from kernels.mix_ffn import depthwise_gate_reference
from kernels.rms_norm import add_rms_norm_reference_
from lab.bench import CONFIGS, relative, seeded
from photos.pictures import write_bytes
from runs import DTYPES, UserError, command, cpu_name, revision
from sanasr import DCAE, Gemma2, LinearDiT, save_module

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"model": 60, "kernels": 60, "micro": 75, "goldens": 30, "bench": 150, "train": 90, "prune": 45,
           "carried": 30}


class Part:
    """What a part knows: device, folders, whether it is a rehearsal, and how much time it has."""

    def __init__(self, name, args):
        self.name, self.out, self.rehearse = name, args.out.resolve(), args.rehearse
        self.device = "cpu" if args.rehearse else "cuda"
        self.model, self.photos = self.out / "work" / "model", self.out / "work" / "photos"
        self.end = args.end

    def left(self):
        return self.end - time.monotonic()

    def run(self, *command, **env):
        """(seconds, what a command of this repository prints). Raises RuntimeError with its last line."""
        if self.left() < 1:
            raise RuntimeError("left out: the part's time is up")
        env = {**os.environ, "SANASR_CACHE": str(self.out / "work" / "cache"), "HF_HUB_OFFLINE": "1", **env}
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True,
                                  text=True, timeout=self.left())
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {time.monotonic() - start:.0f} s") from None
        text = done.stdout + done.stderr
        if done.returncode:
            lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
            raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else ''}"[:300])
        return time.monotonic() - start, text


def tried(what, make):
    """The rows of make(), or one that says why there are none."""
    try:
        yield from make()
    except Exception as error:  # a part goes on whatever happens in one of its measurements
        yield {"what": what, "problem": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


# --- The parts: each yields rows, dicts of columns ---


def part_model(part):
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    folder, device = part.model, part.device
    shutil.rmtree(folder, ignore_errors=True)
    if part.rehearse:
        build, config = tiny.CONFIGS["transformer"]
        tiny.CONFIGS["transformer"] = build, config | {"num_layers": 3}
        tiny.tiny_model(folder)
    else:
        tiny.tiny_model(folder)  # for its tokenizer
        for cls, name in ((DCAE, "vae"), (LinearDiT, "transformer")):
            config = json.loads((CONFIGS / f"{name}.config.json").read_text())
            shutil.rmtree(folder / name)
            save_module(seeded(cls, config, torch.bfloat16, device), folder / name)
        config = tiny.CONFIGS["text_encoder"][1] | {"hidden_size": 2304, "num_hidden_layers": 1}
        shutil.rmtree(folder / "text_encoder")
        save_module(seeded(Gemma2, config, torch.bfloat16, device), folder / "text_encoder")
    side, rng = (160 if part.rehearse else 640), np.random.default_rng(0)
    part.photos.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(part.photos / f"{i}.png")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    yield {"what": "seeded weights", "GB": size / 1e9}


def part_kernels(part):
    obstacle = device_obstacle(part.device, 0)
    if obstacle:
        yield {"what": "all", "problem": f"Triton cannot run: {obstacle}"}
        return

    def error_of(run, reference, inputs, gradient):
        """(largest relative error of outputs and gradients against float64, whether all are finite)."""
        got = micro.step(run, inputs, gradient)()
        double = gradient if gradient is None else gradient.double()
        expected = micro.step(reference, [t.double() for t in inputs], double)()
        scale = expected[0].norm().item()
        errors = [((a.double() - b).norm() / max(b.norm().item(), scale)).item()
                  for a, b in zip(got, expected, strict=True)]
        return max(errors), all(t.isfinite().all().item() for t in got)

    def tensors(dtype, *shapes):
        torch.manual_seed(0)
        return [torch.randn(s).to(part.device, dtype) for s in shapes]
    attention = [(2, 70, 2, d) for d in (16, 32, 64)] + [(1, N, 2, 32) for N in (1, 63, 64, 1025)]
    gate = [(1, 3, 5, 3), (1, 1, 1, 1), (1, 9, 7, 5), (2, 3, 2, 130)]
    norm = [(1, 128), (37, 128), (19, 96), (300, 5), (2, 4096)]
    if part.rehearse:
        attention, gate, norm = attention[:2], gate[:1], norm[2:4]
    else:
        attention += [(1, 65536, 4, 32), (1, 1 << 20, 1, 32)]
        gate += [(1, 25, 41, 2880), (2, 16, 16, 2880), (1, 64, 64, 2048)]
        norm += [(512 * 512, 128), (256 * 256, 256)]

    def case(op, shape, dtype):
        if op == "linear_attention":
            q, k, v, g = tensors(dtype, *[shape] * 4)
            return error_of(lambda *t: kernels.linear_attention(*t, backend="triton"), linear_attention_reference,
                            [q, k, v], g)
        if op == "depthwise_gate":
            B, h, w, H = shape
            u, weight, bias, g = tensors(dtype, (B, h * w, 2 * H), (2 * H, 1, 3, 3), (2 * H,), (B, h * w, H))
            return error_of(lambda u, *t: kernels.depthwise_gate(u, h, w, *t, backend="triton"),
                            lambda u, *t: depthwise_gate_reference(u, h, w, *t), [u, weight, bias], g)
        x, y, weight, bias = tensors(dtype, shape, shape, shape[1:], shape[1:])
        return error_of(lambda x, *t: kernels.add_rms_norm_(x.clone(), *t, 1e-5, backend="triton"),
                        lambda x, *t: add_rms_norm_reference_(x.clone(), *t, 1e-5), [x, y, weight, bias], None)
    for op, shapes in (("linear_attention", attention), ("depthwise_gate", gate), ("add_rms_norm_", norm)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            def rows(op=op, shapes=shapes, dtype=dtype):
                found = {shape: case(op, shape, dtype) for shape in shapes}
                worst = max(found, key=lambda s: found[s][0] if found[s][0] == found[s][0] else float("inf"))
                row = {"what": op, "dtype": str(dtype).removeprefix("torch."), "sizes": len(shapes),
                       "largest error": found[worst][0], "allowed": micro.TOLERANCE[dtype], "at": str(worst)}
                bad = [str(s) for s, (error, finite) in found.items()
                       if not (finite and error <= micro.TOLERANCE[dtype])]
                yield row | ({"problem": f"too large, or not finite: {', '.join(bad)}"} if bad else {})
            yield from tried(op, rows)

    def tests():
        if not importlib.util.find_spec("pytest"):
            raise RuntimeError("pytest is not installed")
        more = ["-k", "other_head_sizes"] if part.rehearse else []
        _, text = part.run("-m", "pytest", "-p", "no:cacheprovider", "tests/test_kernels_triton.py", *more)
        yield {"what": "tests/test_kernels_triton.py", "at": text.strip().splitlines()[-1].strip("= ")}
    yield from tried("tests/test_kernels_triton.py", tests)


def once(call):
    """As `kernels.bench.time_cpu`, but one call: the interpreter takes seconds."""
    start = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - start)] * 3, None


def part_micro(part):
    dtype = torch.float32 if part.rehearse else torch.bfloat16
    backends = {"eager": "torch"} | ({} if device_obstacle(part.device, 0) else {"Triton": "triton"})
    if part.rehearse:
        micro.SIZES[:] = [("DiT 64px", 1, 2, 1, 32, 80)]
        micro.AddRMSNorm.sizes = [("DC-AE 32x4x4", 1, 4, 0, 32, 0)]
        micro.time_cpu = once
    names, copies, matmul = list(micro.OPS), {}, None
    if part.device == "cuda":
        cases = [op.operations(*s[1:], dtype.itemsize, back) for op in micro.OPS.values() for s in op.sizes
                 for back in op.passes]
        copies, matmul = micro.card_rates(dtype, {sum(moved for moved, _ in case) for case in cases})
        yield {"what": "matrix product of 8192", "TFLOP/s": matmul / 1e12}
        yield {"what": "copy, at best", "GB/s": max(copies.values()) / 1e9}
    for name in names:
        def rows(name=name):
            for row in micro.rows([name], dtype, part.device, backends):
                if part.left() < 0:
                    raise RuntimeError("the rest is left out: the part's time is up")
                if not row["ms"]:
                    continue
                *_, last = row["ms"].values()
                result = {"what": name, "where": row["where"], "batch": row["batch"], "pass": row["pass"], "MB":
                          row["bytes"] / 1e6, **{f"{label} ms": ms[1] for label, ms in row["ms"].items()},
                          "GB/s": row["bytes"] / last[1] / 1e6}
                if copies:
                    result["% of copy"] = 100 * row["bytes"] / last[1] * 1e3 / copies[row["bytes"]]
                if row["peak_mb"].get("Triton") is not None:
                    result["peak MB"] = row["peak_mb"]["Triton"]
                yield result
        yield from tried(name, rows)


def part_goldens(part):
    """As tests/test_sanasr.py. In bf16 twice the official code's own error is allowed, in fp32 ten times the CPU's."""
    sys.path.insert(0, str(ROOT / "tests"))
    from safetensors.torch import load_file
    from seeded import seeded_state_dict
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    folder = ROOT / "tests" / "data" / "model"
    bounds = {"dcae_small": (DCAE, 1e-4, 2.3e-2, None), "dit_small": (LinearDiT, 1e-4, 1.7e-2, 5e-3),
              "gemma2_small": (Gemma2, 1e-3, 7.4e-2, None)}  # in fp32, bf16, fp16
    for name, (cls, *allowed) in bounds.items():
        for (label, dtype), bound in zip(DTYPES.items(), allowed, strict=True):
            if bound is None:
                continue  # fp16 is for the transformer alone

            def rows(name=name, cls=cls, label=label, dtype=dtype, bound=bound):
                manifest = json.loads((folder / f"{name}.json").read_text())
                model = cls(manifest["config"])
                model.load_state_dict(seeded_state_dict(manifest["tensors"]), strict=True)
                model = model.to(part.device, dtype).eval().requires_grad_(False)
                data = {k: v.to(part.device, dtype if k[0] in "xzc" else None)
                        for k, v in load_file(folder / f"{name}.safetensors").items()}
                if cls is DCAE:
                    errors = [relative(model.encode(data["x0"]), data["z0"]),
                              relative(model.decode(data["z0"]), data["y0"])]
                elif cls is LinearDiT:
                    errors = [relative(model(data["z0"], data["t0"], data["c0"], data["mask0"]), data["y0"])]
                else:
                    kept = data["mask0"].bool()
                    errors = [relative(model(data["ids0"], data["mask0"])[kept], data["y0"][kept])]
                row = {"what": name, "dtype": label, "relative error": max(errors), "allowed": bound}
                yield row | ({} if all(e <= bound for e in errors) else {"problem": "too large, or not a number"})
            yield from tried(name, rows)


def part_bench(part):
    def case(size, batch, variants, vs, runs, *more, **env):
        def rows():
            file = part.out / "work" / f"bench_{size}_{batch}.json"
            part.run("-m", "lab.bench", "--model", part.model, "--device", part.device, "--dtype",
                     "fp32" if part.rehearse else "bf16", "--size", size, "--batch", batch, "--variants",
                     variants, "--runs", runs, "--json", file, *(["--vs", vs] if vs else []), *more, **env)
            content = json.loads(file.read_text())
            for row in content["rows"]:
                yield {"what": row["variant"], "size": size, "batch": batch, "stage": row["stage"], "p50 ms": 1e3 *
                       row["p50"], "p95 ms": 1e3 * row["p95"], "share of the product": row["share"], "peak GB":
                       row["peak"] / 1e9 if row["peak"] else None, "error": row["error"]}
        return rows
    vs = "diffusers" if importlib.util.find_spec("diffusers") else None
    if not vs:
        yield {"what": "diffusers", "problem": "the package is not installed"}
    if part.rehearse:
        yield from tried("64", case(64, 1, "plain,fast", None, 1))
        yield from tried("64, Inductor", case(64, 1, "plain,inductor", None, 1, TORCH_COMPILE_DISABLE="1"))
        yield from tried("graphs", case(64, 1, "plain,graphs", None, 1))  # a row that says why
        yield from tried("128 in tiles", case(128, 1, "fast", None, 1, "--tile", 64))
        return
    for size, batch in ((512, 1), (1024, 1), (512, 8), (1024, 8)):
        yield from tried(f"{size}, batch {batch}", case(size, batch, "plain,fast,graphs", vs, 10))
    yield from tried("4096 in tiles", case(4096, 1, "fast", None, 1))
    yield from tried("512, Inductor", case(512, 1, "plain,inductor", vs and "compiled", 10))


def part_train(part):
    def case(name, steps, *more, **env):
        def rows():
            folder = part.out / "work" / f"train {name}"
            shutil.rmtree(folder, ignore_errors=True)
            part.run("train.py", "--data", part.photos, "--model", part.model, "--name", folder, "--steps", steps,
                     "--every", steps, "--val", 0, "--tags", "none", "--lpips", "alex", "--device", part.device,
                     "--dtype", "fp32" if part.rehearse else "bf16", "--crop", 96 if part.rehearse else 512, "--batch",
                     1 if part.rehearse else 4, "--workers", 1 if part.rehearse else 8, *more, **env)
            with open(folder / "log.csv", newline="") as f:
                log[name] = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)][1:]
            rates = [row["images_per_s"] for row in log[name][len(log[name]) // 2:]]
            yield {"what": name, "steps": steps, "images/s": statistics.median(rates), "GB":
                   max(row["memory_gb"] for row in log[name]), "first loss": log[name][0]["loss"], "last loss":
                   log[name][-1]["loss"]}
            shutil.rmtree(folder, ignore_errors=True)
        return rows
    log, steps = {}, 2 if part.rehearse else 50
    yield from tried("plain", case("plain", steps))
    yield from tried("checkpointing", case("checkpointing", steps, "--checkpointing"))
    yield from tried("reference kernels", case("reference kernels", 2 if part.rehearse else 10, SANASR_KERNELS="torch"))

    def compared():
        a, b = log["plain"], log["reference kernels"]
        worst = {k: max(abs(x[k] / y[k] - 1) for x, y in zip(a, b, strict=False)) for k in ("loss", "grad_norm")}
        yield {"what": "Triton against the reference, the same steps", "steps": min(len(a), len(b)), **{
            f"largest difference of {k}": v for k, v in worst.items()}}
    yield from tried("Triton against the reference", compared)


def part_prune(part):
    def rows():
        out, steps = part.out / "work" / "pruned", 2 if part.rehearse else 20
        shutil.rmtree(out, ignore_errors=True)
        seconds, text = part.run("prune.py", "--data", part.photos, "--model", part.model, "--out", out, "--steps",
                                 steps, "--keep", 2 if part.rehearse else 16, "--tags", "none", "--lpips", "alex",
                                 "--device", part.device, "--dtype", "fp32" if part.rehearse else "bf16", "--workers",
                                 1 if part.rehearse else 8, *(["--crop", 96] if part.rehearse else []))
        rate = re.findall(r"([\d.]+)(s/it|it/s)", text)[:-1]  # the last one is the mean, with the start and compilation
        row = {"what": "calibration and the pruned model", "samples": steps, "seconds in all": seconds}
        if rate:
            row["samples/s"] = float(rate[-1][0]) if rate[-1][1] == "it/s" else 1 / float(rate[-1][0])
        with open(out / "saliency.csv", newline="") as f:
            row["dropped blocks"] = " ".join(r["block"] for r in csv.DictReader(f) if r["kept"] == "0")
        yield row
        shutil.rmtree(out)
    yield from tried("calibration", rows)


def part_carried(part):
    inputs, results = sorted((ROOT / "examples").glob("*.png")), {}
    if part.rehearse:
        small = part.out / "work" / "cat.png"
        Image.open(inputs[0]).convert("RGB").crop((0, 0, 32, 32)).save(small)
        inputs = [small]

    def case(device, dtype, fast):
        def rows():
            name = f"{device} {dtype} fast {fast}"
            out = part.out / "work" / name.replace(" ", "_")
            seconds, _ = part.run("eval.py", *inputs, "--out", f"{out}/", "--device", device, "--dtype", dtype,
                                  "--fast", fast)
            results[name] = [np.asarray(Image.open(out / f"{p.stem}_x4.png"), float) for p in inputs]
            row = {"what": name, "pictures": len(inputs), "seconds with the start": seconds}
            if name != "cpu fp32 fast off":
                pairs = list(zip(results[name], results["cpu fp32 fast off"], strict=True))
                row["largest difference of 255"] = max(np.abs(a - b).max() for a, b in pairs)
                row["mean difference of 255"] = max(np.abs(a - b).mean() for a, b in pairs)
                if row["mean difference of 255"] > (1 if dtype == "fp32" else 3):
                    row["problem"] = "not the CPU's picture"
            yield row
        return rows
    cases = [("cpu", "fp32", "off"), (part.device, "fp32", "off"), (part.device, "bf16", "off"),
             (part.device, "bf16", "on"), (part.device, "fp16", "off")]
    for device, dtype, fast in (cases[0], cases[3]) if part.rehearse else cases:
        yield from tried(f"{device} {dtype} fast {fast}", case(device, dtype, fast))


PARTS = {name: globals()[f"part_{name}"] for name in SECONDS}

# --- The command ---

ROW = "row "  # begins a line of a part's output that is a result


def one_part(args):
    """In a process of its own: prints each row as a line of JSON."""
    part = Part(args.part, args)
    for row in tried(args.part, lambda: PARTS[args.part](part)):
        print(ROW + json.dumps(row), flush=True)


def about(rehearse):
    name = "no GPU" if rehearse or not torch.cuda.is_available() else torch.cuda.get_device_name()
    return {"device": name, "cpu": cpu_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton":
            triton and triton.__version__, "revision": revision(ROOT), "date":
            time.strftime("%Y-%m-%d"), "rehearsal": rehearse}


def cell(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "\\|")


def write(out, results):
    """gpu.json and gpu.md."""
    lines = [("# A rehearsal on a CPU: no number here is a GPU's" if results["about"]["rehearsal"] else "# GPU"), "",
             ", ".join(f"{k} {v}" for k, v in results["about"].items() if k != "rehearsal"), ""]
    for name, part in results["parts"].items():
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        lines += [f"## {name}, {part['seconds']:.0f} s", "", "| " + " | ".join(columns) + " |",
                  "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in part["rows"]] + [""]
    write_bytes(out / "gpu.json", json.dumps(results, indent=1) + "\n")
    write_bytes(out / "gpu.md", "\n".join(lines))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--parts", default=",".join(SECONDS), metavar="LIST", help="default: %(default)s")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # this process is one part
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # of the part, by time.monotonic
    args = parser.parse_args(argv)
    if args.part:
        return one_part(args)
    names = args.parts.split(",")
    if unknown := set(names) - set(SECONDS):
        raise UserError(f"--parts {args.parts}: no part is called {', '.join(sorted(unknown))!r}")
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} finds no NVIDIA GPU here; --rehearse runs the same on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if "model" not in names and not (args.out / "work" / "model").exists():
        names.insert(0, "model")
    results = {"about": about(args.rehearse), "parts": {}}
    if (args.out / "gpu.json").exists():
        before = json.loads((args.out / "gpu.json").read_text())
        if all(before["about"].get(key) == value for key, value in results["about"].items() if key != "date"):
            results["parts"] = before["parts"]
    problems, factor = 0, 20 if args.rehearse else 1
    end = time.monotonic() + factor * sum(SECONDS[name] for name in names)
    for name in names:
        start, rows = time.monotonic(), []
        results["parts"][name] = {"seconds": 0.0, "rows": rows}
        seconds = max(1, min(factor * SECONDS[name], end - start))
        command = [sys.executable, "-m", "lab.gpu", "--part", name, "--out", args.out.resolve(), "--end",
                   str(start + seconds), *["--rehearse"] * args.rehearse]
        interpreted = args.rehearse and name in ("kernels", "micro")  # it would take the networks hours
        env = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
        with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as process:
            timer = threading.Timer(seconds + 5, process.kill)  # a kernel that hangs must not stop the rest
            timer.start()
            last = ""
            for line in process.stdout:
                if line.startswith(ROW):
                    rows.append(json.loads(line.removeprefix(ROW)))
                    results["parts"][name]["seconds"] = time.monotonic() - start
                    write(args.out, results)
                    line = f"{name}: " + "  ".join(f"{k} {cell(v)}" for k, v in rows[-1].items()) + "\n"
                last = line.strip() or last
                print(line, end="", flush=True)
            timer.cancel()
        if process.returncode:
            rows.append({"what": name, "problem": f"the part ended with {process.returncode}: {last}"[:300]})
        results["parts"][name]["seconds"] = time.monotonic() - start
        problems += sum("problem" in row for row in rows)
        write(args.out, results)
    shutil.rmtree(args.out / "work", ignore_errors=True)
    print(f"{args.out}/gpu.md: {problems} rows name a problem")
    return 0


if __name__ == "__main__":
    sys.exit(main())
