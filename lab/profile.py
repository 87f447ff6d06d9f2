"""Parameters, multiply-accumulates and latency of each stage of the restorer, for one square result.

    python -m lab.profile                                      the bundled model, a result of 512×512, 300 text tokens
    python -m lab.profile --model sana-600m-512 --side 1024 --device cuda

A multiply-accumulate (MAC) is one product of a convolution, a linear layer or attention, added up. They are counted by
torch.utils.flop_counter, two FLOPs for a MAC, which leaves out norms, activations, softmax and element-wise work.
"""
import json
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import runs
from fast import load_model
from kernels.timer import timed
from runs import UserError, add_device_options, check_ranges, command, dtype_name, pick_device, pick_dtype
from sanasr import DCAE, MAX_TOKENS, Gemma2, LinearDiT


@dataclass
class Stage:
    """One line of the table. ms: the median; None where it was not measured. times: how often it runs for a picture."""
    name: str
    parameters: int
    macs: int
    ms: float | None = None
    times: int = 1


@torch.no_grad()
def count_macs(function, *args):
    """The MACs of function(*args); on the meta device this takes neither memory nor time."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() // 2


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
def latency(function, args, repeats=5):
    """Milliseconds of function(*args), the median of `repeats` after one to warm up."""
    return 1e3 * median(timed(lambda: function(*args), args[0].device, 1 + repeats)[1][1:])


def parts(model):
    """(one of the model's transformers, all of them, its stem or None); a SanaSR has one transformer and no stem."""
    experts = getattr(model, "experts", None)
    return (model.use(0), experts, model.stem) if experts else (model.dit, [model.dit], None)


def count(model, side=512, steps=1):
    """model: SanaSR, or LinearSR in `steps` steps -> [Stage] for a result of side × side, a multiple of 32, no times.

    All is counted on the meta device, so the text encoder need not be read.
    """
    config = json.loads((model.folder / "text_encoder" / "config.json").read_text("utf-8"))
    dit, experts, stem = parts(model)
    with torch.device("meta"):
        shadows = DCAE(model.vae.config), LinearDiT(dit.config), Gemma2(config)
        stem = stem and type(stem)(stem.config)
    table = [Stage(name, parameters(part), count_macs(function, *args))
             for name, part, function, args in stages(*shadows, side, stem=stem)]
    for stage in table:
        if stage.name == "dit":
            stage.times, stage.parameters = steps, len(experts) * stage.parameters
    return table


def profile(model, side=512, steps=1):
    """`count`, with the latency of every stage. The text encoder is loaded last, when the others are done.

    Raises OSError or ValueError where that fails.
    """
    dit, _, stem = parts(model)
    table = count(model, side, steps)  # the text encoder first
    for stage, (_, _, *call) in zip(table[1:], stages(model.vae, dit, None, side, stem=stem), strict=True):
        stage.ms = latency(*call)
    text = Gemma2.from_pretrained(model.folder / "text_encoder", model.vae_dtype, model.device)
    table[0].ms = latency(*stages(model.vae, dit, text, side)[0][2:])
    return table


def print_profile(table):
    """Print the table. The total leaves the text encoder out: a prompt's states are computed once, then cached."""
    def line(name, parameters, macs, ms):
        print(f"{name:24}{parameters / 1e6:12.2f} M{macs / 1e9:12.2f} G{ms:14.1f}")
    picture = [stage for stage in table if stage.name != "text"]
    steps = max(stage.times for stage in picture)
    print(f"{'':24}{'parameters':>14}{'MACs':>14}{'ms':>14}")
    for stage in table:
        line(stage.name + ", one step" * (stage.times > 1), stage.parameters, stage.macs, stage.ms)
    line("all but text" + f", {steps} steps" * (steps > 1), sum(stage.parameters for stage in picture),
         *(sum(stage.times * getattr(stage, key) for stage in picture) for key in ("macs", "ms")))


@command
def main(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    add("--side", type=int, default=512, metavar="N", help="of the result, a multiple of 32 (default: 512)")
    add("--steps", type=int, metavar="N", help="of LinearSR (default: 20)")
    add_device_options(add)
    args = parser.parse_args(argv)
    if args.side < 32 or args.side % 32:
        raise UserError(f"--side {args.side}: the side must be a multiple of 32")
    check_ranges(args)
    device = pick_device(args.device)
    model = load_model(args.model, device, pick_dtype(args.dtype, device))
    many = hasattr(model, "experts")
    if args.steps and not many:
        raise UserError(f"--steps: {args.model} takes one step; leave it out")
    table = profile(model, args.side, steps=args.steps or (20 if many else 1))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{device.type}, {torch.get_num_threads()} threads")
    print(f"{args.model}, {args.side}×{args.side}, {dtype_name(model.dtype)}, {where}")
    print_profile(table)


if __name__ == "__main__":
    main()
