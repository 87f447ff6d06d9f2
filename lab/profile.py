"""Parameters, multiply-accumulates and latency of each stage of the restorer. `eval.py --profile` prints them.

A multiply-accumulate (MAC) is one product of a convolution, a linear layer or attention, added up; norms, activations,
softmax and element-wise work are left out, as torch.utils.flop_counter leaves them out. It counts two FLOPs for a MAC.
"""
import json
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn as nn

from sanasr import (
    DCAE,
    MAX_TOKENS,
    CrossAttention,
    Gemma2,
    GemmaAttention,
    GLUMBConv,
    LinearAttention,
    LinearDiT,
    MultiscaleLinearAttention,
)


@dataclass
class Stage:
    """One line of the table. ms: the median; None where it was not measured. times: how often it runs for a picture."""
    name: str
    parameters: int
    macs: int
    ms: float | None = None
    times: int = 1


def own_macs(module, args, out):
    """The MACs of `module` itself, without those of its children. args: its inputs; out: its output."""
    x = args[0]
    if isinstance(module, nn.Conv2d):
        return out.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):  # Conv1x1 as well
        return x.numel() // module.in_features * module.weight.numel()
    if isinstance(module, GLUMBConv):  # its three layers run in one kernel, past their own forward
        parts = module.conv_inverted, module.conv_depth, module.conv_point
        return x.numel() // module.conv_inverted.in_features * sum(p.weight.numel() for p in parts)
    if isinstance(module, LinearAttention):  # x: B,N,D. KᵀV takes N·d·d a head, Q times that and times ΣK N·d·(d + 1)
        return x.numel() * (2 * x.shape[2] // module.heads + 1)
    if isinstance(module, MultiscaleLinearAttention):  # x: B,C,H,W; heads of every scale
        return x.numel() * (1 + len(module.to_qkv_multiscale)) * (2 * module.head_dim + 1)
    if isinstance(module, CrossAttention):  # x: B,N,D; args[1]: B,T,D. QKᵀ and PV, N·T·D each
        return 2 * x.shape[0] * x.shape[1] * args[1].shape[1] * module.to_q.out_features
    if isinstance(module, GemmaAttention):  # x: B,T,D; all T² pairs are computed, then masked
        return 2 * x.shape[0] * x.shape[1] ** 2 * module.q_proj.out_features
    return 0


def count_macs(module, function, *args):
    """The MACs of `module` while function(*args) runs; on the meta device this takes neither memory nor time."""
    total = 0

    def hook(m, inputs, out):
        nonlocal total
        total += own_macs(m, inputs, out)
    inside = {id(part) for m in module.modules() if isinstance(m, GLUMBConv)
              for part in (m.conv_inverted, m.conv_depth, m.conv_point)}  # they run on their own under an adapter
    hooks = [m.register_forward_hook(hook) for m in module.modules() if id(m) not in inside]
    try:
        with torch.no_grad():
            function(*args)
    finally:
        for h in hooks:
            h.remove()
    return total


def parameters(module):
    """The number of parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def stages(vae, dit, text, side=512, tokens=MAX_TOKENS, stem=None):
    """[(name, module that holds the parameters, function, inputs)] in the order of `restore`, each for one picture of
    side × side. vae: DCAE; dit: LinearDiT; text: Gemma2 or None, which leaves it out; stem: LinearSR's, which takes the
    encoder's place. The inputs are random."""
    def random(part, *shape):
        p = next(part.parameters())
        return torch.randn(shape, device=p.device, dtype=p.dtype)
    latent = vae.config["latent_channels"], side // vae.factor, side // vae.factor
    device = next(dit.parameters()).device
    c, mask = random(dit, 1, tokens, dit.config["caption_channels"]), torch.ones(1, tokens, device=device)
    t = torch.full((1,), 900.0, device=device)
    found = [("encode", vae.encoder, vae.encode, (random(vae, 1, vae.config["in_channels"], side, side),)),
             ("dit", dit, dit, (random(dit, 1, *latent), t, c, mask)),
             ("decode", vae.decoder, vae.decode, (random(vae, 1, *latent),))]
    if stem:
        condition = random(stem, 1, stem.config["width"], *latent[1:])
        found[:2] = [("stem", stem, stem, (random(stem, 1, 3, side // 4, side // 4),)),
                     ("dit", dit, dit, (*found[1][3], condition))]
    if text:
        ids = torch.ones(1, tokens, dtype=torch.long, device=next(text.parameters()).device)
        found.insert(0, ("text", text, text, (ids, torch.ones_like(ids))))
    return found


@torch.inference_mode()
def latency(function, args, runs=5):
    """Milliseconds of function(*args), the median of `runs` after one to warm up. Waits for a GPU."""
    device, times = args[0].device, []
    for _ in range(1 + runs):
        start = time.perf_counter()
        function(*args)
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize(*[device] * (device.type == "cuda"))
        times.append(1000 * (time.perf_counter() - start))
    return median(times[1:])


def parts(model):
    """(one of the model's transformers, all of them, its stem or None); a SanaSR has one transformer and no stem."""
    experts = getattr(model, "experts", None)
    return (model.use(0), experts, model.stem) if experts else (model.dit, [model.dit], None)


def count(model, side=512, tokens=MAX_TOKENS, steps=1):
    """model: SanaSR, or LinearSR in `steps` steps -> [Stage] for a result of side × side, a multiple of 32, no times.

    All is counted on the meta device, so the text encoder need not be read.
    """
    config = json.loads((model.folder / "text_encoder" / "config.json").read_text("utf-8"))
    dit, experts, stem = parts(model)
    with torch.device("meta"):
        shadows = DCAE(model.vae.config), LinearDiT(dit.config), Gemma2(config)
        stem = stem and type(stem)(stem.config)
    table = [Stage(name, parameters(part), count_macs(part, function, *args))
             for name, part, function, args in stages(*shadows, side, tokens, stem)]
    for stage in table:
        if stage.name == "dit":
            stage.times, stage.parameters = steps, len(experts) * stage.parameters
    return table


def profile(model, side=512, tokens=MAX_TOKENS, steps=1):
    """`count`, with the latency of every stage. The text encoder is loaded last, when the others are done.

    Raises OSError or ValueError where that fails.
    """
    dit, _, stem = parts(model)
    table = count(model, side, tokens, steps)
    by_name = {stage.name: stage for stage in table}
    for name, _, function, args in stages(model.vae, dit, None, side, tokens, stem):
        by_name[name].ms = latency(function, args)
    text = Gemma2.from_pretrained(model.folder / "text_encoder", model.vae_dtype, model.device)
    _, _, function, args = stages(model.vae, dit, text, side, tokens)[0]
    by_name["text"].ms = latency(function, args)
    return table


def print_profile(table):
    """Print the table. The total leaves the text encoder out: a prompt's states are computed once, then cached."""
    def line(name, *cells):
        return name.ljust(24) + "".join(cell.rjust(14) for cell in cells)

    def numbers(name, parameters, macs, ms):
        return line(name, f"{parameters / 1e6:.2f} M", f"{macs / 1e9:.2f} G", f"{ms:.1f}")
    picture = [stage for stage in table if stage.name != "text"]
    steps = max(stage.times for stage in picture)
    print(line("", "parameters", "MACs", "ms"))
    for stage in table:
        name = f"{stage.name}, one step" if stage.times > 1 else stage.name
        print(numbers(name, stage.parameters, stage.macs, stage.ms))
    total = [sum(stage.parameters for stage in picture), *(sum(stage.times * getattr(stage, key) for stage in picture)
                                                           for key in ("macs", "ms"))]
    print(numbers("all but text" + (f", {steps} steps" if steps > 1 else ""), *total))
