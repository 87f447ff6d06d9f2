"""Makes two models like the bundled ones from a folder of photos. Rerun to resume.

    make bundled HQ=./hq            python -m lab.bundled --data ./hq, into runs/bundled

    pixels, sharp              encoder and decoder end to end on degraded photos       train.py --learn autoencoder
    latent, texture            the encoder alone in latents, the decoder alone
    tags, prior                the text encoder and a first prior on E(x_H)            lab.prior
    shared                     one prior for both systems, with and without the LR     linearsr.train --stage pretrain
                               picture: the transformer of both, and LinearSR's stem
    warm, adapter              Algorithm 1, in latents, then the bundled model's       train.py
                               losses
    experts                    four low-rank differences from the shared network       linearsr.train --stage experts

It prints the command of each stage, and first how many hours they take here: an estimate for one core of an AMD EPYC
(family 25 model 17, with bf16 instructions), times what a training step of the autoencoder takes here by what it took
there. The numbers of steps are a plan: with all of them no chain has been run to its end yet. --share 0.002 runs all
stages with one step and one picture in 500, in 16 minutes of CPU time: a rehearsal, whose models restore nothing.
--teacher: pictures that a restorer made of runs/pairs/KEY/lr, of the same names; KEY is printed by the first stage.
Without them the autoencoder learns from the photos alone. The stage texture takes VGG16, 553 MB, fetched first of all.
"""
import shutil
from pathlib import Path

import torch

import runs
import weights
from kernels.timer import timed
from lab import stages
from lab.stages import Stage
from metrics import DISTS
from runs import DTYPES
from sanasr import DCAE

STEP = 1.3  # seconds of `step` on that core, in bf16


def step(args):
    """Seconds of a step of the autoencoder's training, the second of two: batch 8 of 224²."""
    net = DCAE.from_pretrained(weights.folder("embedded") / "vae", torch.float32, args.device)
    net.requires_grad_(True).to(memory_format=torch.channels_last)

    def once():
        with torch.autocast(args.device.type, DTYPES[args.dtype], args.dtype != "fp32"):
            net.decode(net.encode(torch.zeros(8, 3, 224, 224, device=args.device))).float().mean().backward()
    return timed(once, args.device, 2)[1][1]


def plan(args, slower):
    """The stages, in their order. slower: than the core whose hours they name."""
    out = args.out.resolve()
    machine = ["--device", args.device.type, "--dtype", args.dtype, "--workers", args.workers, "--seed", args.seed]
    data, tags = ["--data", *(Path(folder).resolve() for folder in args.data)], out / "tags.csv"
    teacher = ["--teacher", args.teacher.resolve()] if args.teacher else []
    first, model, linearsr = out / "first", out / "embedded", out / "linearsr"

    def n(count):
        return max(1, round(count * args.share))

    def stage(name, leaves, hours, *line, resume=None):
        return Stage(name, [*line], leaves, resume, hours * slower * args.share)

    def learn(name, init, hours, *options):
        folder = out / name
        init = ["--init", out / init / "vae"] if init else []
        return stage(name, None, hours, "train", "--learn", "autoencoder", *data, "--name", folder, *init, *options,
                     *machine, "--pairs", n(24_000), resume=folder / "state.pt")

    def adapt(name, init, hours, *options):
        return stage(name, None, hours, "train", *data, "--model", model, "--name", out / name, "--init", init,
                     "--tags", "none", "--mild", 0.5, "--crop", 256, *options, *machine,
                     resume=out / name / "state.pt")
    flow = ["linearsr.train", *data, "--name", linearsr, "--crop", 256, "--tags", tags, "--mild", 0.5,
            "--batch", 32, "--pairs", n(24_000), *machine, "--stage"]
    export = ["linearsr.train", "--stage", "export", "--name", linearsr, "--start", "end", "--to"]
    return [
        learn("pixels", None, 1, "--perceptual", 0, "--steps", n(2500)),
        learn("sharp", "pixels", 9, *teacher, "--steps", n(20_000)),
        learn("latent", "sharp", 3, "--latent", "--lr", 4e-4, "--batch", 32, "--steps", n(4000)),
        learn("texture", "latent", 4, *teacher, "--texture", 0.3, "--lr", 1e-4, "--steps", n(5000)),
        stage("tags", tags, 0, "lab.prior", "tags", *data, "--to", tags),
        stage("prior", None, 1, "lab.prior", "train", *data, "--vae", out / "texture", "--out", out / "prior",
              "--batch", 32, "--lr", 1e-3, "--latents", n(8000), "--steps", n(3000), *machine),
        # an export is done once the file is there that it writes last
        stage("first model", first / "provenance.json", 0, "lab.prior", "export", "--out", out / "prior",
              "--to", first),
        stage("shared", None, 8, *flow, "pretrain", "--model", first, "--unconditional", 0.4, "--steps", n(30_000)),
        stage("its network", out / "network" / "config.json", 0, *export, out / "network", "--of", "pretrain",
              "--model", first),
        stage("model", model / "provenance.json", 0, "lab.prior", "export", "--out", out / "prior", "--to", model,
              "--transformer", out / "network" / "transformer"),
        adapt("warm", "none", 1, "--latent", "--rank", 32, "--lora-targets", "attn+ffn", "--lr", 1e-3, "--batch", 32,
              "--steps", n(1000)),
        adapt("adapter", out / "warm" / "adapter.safetensors", 0.5, "--lpips", "alex", "--lr", 1e-4, "--steps", n(600)),
        stage("experts", None, 3, *flow, "experts", "--model", model, "--start", "end", "--steps", n(2500)),
        stage("LinearSR", out / "linearsr-embedded" / "config.json", 0, *export, out / "linearsr-embedded",
              "--model", model)]


@runs.command
def main(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DIR", help="folders of clean photos, searched recursively")
    add("--teacher", type=Path, metavar="DIR", help="see below")
    add("--share", type=float, default=1.0, metavar="X", help="of all steps, pairs and crops, see below")
    add("--out", type=Path, default=Path("runs/bundled"), metavar="DIR", help="the run")
    runs.add_device_options(add, workers=2)
    args = parser.parse_args(argv)
    runs.check_ranges(args)
    runs.resolve_device(args)
    DISTS.from_pretrained()  # what cannot be fetched ends this now, not after hours
    stages.run(plan(args, step(args) / STEP))
    shutil.copy(args.out / "adapter" / "adapter.safetensors", args.out / "embedded")
    print(f"{args.out / 'embedded'} and {args.out / 'linearsr-embedded'} are models for eval.py --model")


if __name__ == "__main__":
    main()
