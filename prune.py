"""Makes the transformer shallower: prompt-aware structured pruning of whole blocks, Algorithm 2 of the paper.

    python prune.py --data ./hq --adapter runs/official/adapter.safetensors --model sana-600m-512 --out runs/pruned
    … --resume                                          the same line once more, after a stop or a kill
    … --resume --compare --validate --heal 1000         and more of it
    python eval.py lr.png --model runs/pruned                                # the result is a model like any other

    W ← W + (α/r) B A                                   the adapter is merged; f0 is a frozen copy of the prior
    L_cal = ω(t)·(L_rec + L_align)                      ω(t) = 1 − log(t+1)/log(T+1), T = 1000     (Eq. 21, 22)
    F_i = 1/K Σ_k ω(t_k)·(∂L_cal/∂w_i)²                 over K = 400 samples, in float32           (Eq. 23)
    S_ℓ = Σ_{i in block ℓ} w_i² / (F_i + ε_p)           one score a block                          (Eq. 24)
    keep the first and the last block, then the blocks of highest S that fit the budget            (Eq. 11)

Leaves in --out: transformer/ (fewer blocks, no adapter), vae/, text_encoder/ and tokenizer/ as they were,
saliency.csv and saliency.png, calibration.pt (F: with --resume another score, ε_p or budget costs no calibration);
--compare adds compare.csv and oracle.csv, --validate adds validation.csv, --heal the model healed/ beside the pruned.
"""
import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
import train
import weights
from fast import load_model
from metrics import METRICS
from metrics.score import evaluate, folder_pairs, mean, pick
from objective import Conditions, Latents, Update, calibration_loss, fill_defaults, in_float32, load_lpips, omega
from photos.pairs import TrainingData, add_data_options, find_tags
from photos.pictures import atomically, bicubic, png, read_rgb, write_bytes
from runs import DTYPES, UserError, write_csv
from sanasr import LinearDiT, SanaSR
from trainer import compare as compare_settings
from weights.files import fingerprint, save_module

KEPT = 16 / 28  # of the blocks: of SANA-0.6B's what fits into the paper's budget, 0.35e9 parameters
MAX_DROP = 0.03  # of any metric, relative to the unpruned model, in its worse direction
RANDOM = 5  # orders of the blocks that --compare draws
SETTINGS = ("protocol", "timestep", "suffix", "lpips", "crop", "seed", "dtype")  # what F depends on, besides the files
SALIENCIES = {  # of a tensor w of a block, with its F: what is summed over the block
    "paper": lambda w, f, eps: w.square() / (f + eps),                                                  # Eq. 24
    "obd": lambda w, f, eps: w.square() * (f / 2),                                          # Optimal Brain Damage
    "magnitude": lambda w, f, eps: w.square(),                                              # needs no calibration
}

# --- The squared gradients of the loss ---


class Fisher:
    """Accumulates Σ_k ω(t_k)·(∂L_cal/∂w)² for every parameter of the blocks, in float32.

    A gradient is squared and freed as soon as the backward pass has it: no more than one block's are in memory.
    """

    def __init__(self, dit):
        self.weight, self.sums = 0.0, {}  # ω(t_k) of the current sample; {key: tensor}
        for key, p in dit.transformer_blocks.requires_grad_(True).named_parameters():
            self.sums[key] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            p.register_post_accumulate_grad_hook(partial(self.add, self.sums[key]))

    def add(self, total, p):
        total.add_(p.grad.float().square_(), alpha=self.weight)
        p.grad = None


class Calibration:
    """The samples, and all that L_cal of one needs but the network that is pruned. Fills in args.lpips."""

    def __init__(self, args, model, data):
        prior = LinearDiT.from_pretrained(model.folder / "transformer", model.dtype, args.device)
        model.vae.decoder.checkpointing = args.checkpointing != "none"
        model.dit.checkpointing = prior.checkpointing = args.checkpointing == "all"
        lpips, args.lpips = load_lpips(args.lpips, args.device, torch.float32)
        self.args, self.model, self.data, self.f0 = args, model, data, in_float32(prior)
        self.update = partial(Update, f0=self.f0, vae=Latents(model.vae, model.scaling_factor), tau=args.timestep,
                              lpips=lpips)  # (f, batch=…) -> Update
        self.conditions = Conditions(model)
        self.conditions.prepare(sorted(set(data.prompts)))

    def samples(self, first, last, signals=None):
        """Yields batches of one sample, numbers `first` to `last` - 1 of those that train.py draws."""
        args = argparse.Namespace(**vars(self.args) | {"steps": last})
        for batch in train.training_batches(args, self.model, self.data, first, signals or runs.Signals()):
            batch |= {k: v.to(args.device) for k, v in batch.items() if torch.is_tensor(v)}
            batch["c"], batch["m"] = self.conditions(batch["prompt"])
            yield batch


def calibrate(args, dit, calibration, settings, every=50):
    """F over `args.steps` samples, {key within transformer_blocks: tensor}; its sums are kept in calibration.pt.

    Raises UserError where those do not fit. A signal saves them and ends the command.
    """
    path, step, fisher, f = args.out / "calibration.pt", 0, Fisher(dit), in_float32(dit)
    if args.resume and path.exists():
        saved = runs.load_state(path, damaged="delete it to calibrate anew", keys=("step", "settings", "sums"))
        compare_settings(path, saved["settings"], settings, "choose another --out")
        step = saved["step"]
        if step > args.steps:
            raise UserError(f"--resume: {path} holds {step} steps already, more than --steps {args.steps}")
        try:
            for key, total in fisher.sums.items():
                total.copy_(saved["sums"][key])
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"{path} does not fit this transformer; delete it to calibrate anew")
    with runs.Signals() as signals, tqdm(total=args.steps, initial=step, desc="calibrating", dynamic_ncols=True) as bar:
        for batch in calibration.samples(step, args.steps, signals):
            loss, fisher.weight = calibration_loss(calibration.update(f, batch=batch)), omega(batch["t"].item())
            if not loss.isfinite():
                raise UserError(f"step {step + 1}: loss {loss.item():g} on {batch['name'][0]}; the last save is whole")
            loss.backward()
            step += 1
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            bar.update()
            if step % every == 0 and step < args.steps:
                runs.save_state(path, {"step": step, "settings": settings, "sums": fisher.sums})
            if signals.caught:
                break
        if step > bar.initial:
            runs.save_state(path, {"step": step, "settings": settings, "sums": fisher.sums})
    if signals.caught:
        print(f"interrupted; step {step} is saved, --resume goes on")
        sys.exit(128 + signals.caught)
    dit.requires_grad_(False)
    return {key: total / step for key, total in fisher.sums.items()}


# --- Scores, the choice, and the folder ---


@torch.no_grad()
def block_scores(dit, kind, fisher=None, eps=1e-8):
    """[score of each block], a `kind` of SALIENCIES. fisher: F, as `calibrate` returns it; magnitude needs none."""
    scores = [0.0] * len(dit.transformer_blocks)
    for key, p in dit.transformer_blocks.named_parameters():
        value = SALIENCIES[kind](p.float(), fisher and fisher[key], eps)
        scores[int(key.partition(".")[0])] += value.sum(dtype=torch.float64).item()
    return scores


def choose(scores, keep):
    """Indices of the `keep` blocks to keep, ascending: first and last, then greedily by falling score (Eq. 11)."""
    last = len(scores) - 1
    inner = sorted(range(1, last), key=lambda i: (-scores[i], i))
    return sorted([0, last, *inner[:keep - 2]])


def room(dit, keep=None, budget=None):
    """How many blocks to keep: `keep`, or what the budget holds, in parameters of the whole transformer, or KEPT.

    All blocks have one size, so the greedy choice solves the knapsack problem exactly. Raises ValueError.
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in dit.transformer_blocks]
    assert len(set(sizes)) == 1, f"blocks of different sizes, {sorted(set(sizes))}: greedy would not be exact"
    count, size, total = len(sizes), sizes[0], sum(p.numel() for p in dit.parameters())
    if budget is not None:
        keep = max(0, count + int((min(total, budget) - total) // size))
    keep = max(2, round(KEPT * count)) if keep is None else keep
    if not 2 <= keep < count:
        raise ValueError(f"{keep} of {count} blocks: the first and the last are kept, and one is dropped at least: "
                         f"--budget {total - (count - 2) * size} to {total - size} parameters")
    return keep


def with_blocks(dit, kept):
    """A LinearDiT of only the blocks `kept`, in that order; it shares the weights of `dit`."""
    with torch.device("meta"):
        small = LinearDiT(dit.config | {"num_layers": len(kept)})
    state = {key: p for key, p in dit.state_dict().items() if not key.startswith("transformer_blocks.")}
    for new, old in enumerate(kept):
        state |= {f"transformer_blocks.{new}.{key}": p for key, p in dit.transformer_blocks[old].state_dict().items()}
    small.load_state_dict(state, assign=True)
    return small.eval().requires_grad_(False)


def link_parts(source, out):
    """Put vae/, text_encoder/, tokenizer/, scheduler/ and provenance.json, which names the losses of further trainings,
    of `source` into `out`, as hard links or copies."""
    names = ("vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*", "provenance.json")
    for path in [path for name in names for path in source.glob(name)]:
        with atomically(out / path.relative_to(source)) as temporary:
            try:
                os.link(path.resolve(), temporary)  # the Hub's cache holds links into its store
            except OSError:
                shutil.copyfile(path, temporary)


def write_model(args, model, scores, kept, about):
    """Write the pruned model, saliency.csv and saliency.png. about: what its config says of it."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    pruned = with_blocks(model.dit, kept)
    link_parts(model.folder, args.out)
    save_module(pruned, args.out / "transformer", metadata=about)
    rows = [{"block": i, "score": s, "rank": order.index(i) + 1, "kept": int(i in kept)} for i, s in enumerate(scores)]
    write_csv(args.out / "saliency.csv", list(rows[0]), rows)
    picture = runs.curves([{"step": row["block"]} | row for row in rows], ["score", "rank", "kept"])
    write_bytes(args.out / "saliency.png", png(picture))
    before, after = (sum(p.numel() for p in dit.parameters()) / 1e6 for dit in (model.dit, pruned))
    print(f"{len(kept)} of {len(scores)} blocks kept: {after:.2f} of {before:.2f} M parameters; dropped "
          f"{', '.join(str(i) for i in range(len(scores)) if i not in kept)}; {args.out}")


# --- What may follow: the comparison with an oracle, healing, validation ---


def rank_correlation(a, b):
    """Spearman's ρ of two lists of numbers; equal numbers are ranked in their order."""
    return float(np.corrcoef([np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)])[0, 1])


@torch.no_grad()
def masked(dit, nonzero):
    """Unstructured magnitude pruning, one threshold for all blocks: a copy of `dit` with all its blocks, in which the
    smallest weights of the blocks are zero, so that `nonzero` parameters of the whole transformer are left."""
    copy = with_blocks(dit, range(len(dit.transformer_blocks)))
    blocks = list(copy.transformer_blocks.parameters())
    flat = torch.nn.utils.parameters_to_vector(blocks)
    drop = sum(p.numel() for p in copy.parameters()) - nonzero
    flat[flat.abs().topk(drop, largest=False, sorted=False).indices] = 0
    torch.nn.utils.vector_to_parameters(flat, blocks)  # new memory: the weights of `dit` are left as they are
    return copy


@torch.no_grad()
def mean_losses(calibration, networks, first, count, what):
    """{name: LinearDiT} -> {name: mean L_cal over the `count` samples from number `first` on}."""
    totals = dict.fromkeys(networks, 0.0)
    with tqdm(total=count * len(networks), desc=what, dynamic_ncols=True) as bar:
        for batch in calibration.samples(first, first + count):
            of_prior = calibration.update(calibration.f0, batch=batch)
            for name, dit in networks.items():
                update = calibration.update(in_float32(dit), batch=batch)
                update.encoded, update.q_h = of_prior.encoded, of_prior.q_h  # the same for every network
                totals[name] += calibration_loss(update).item() / count
                bar.update()
    return totals


def compare(args, calibration, dit, fisher, keep):
    """Compare every score with an oracle, the increase of the loss without each block. Extends the paper's Table 6.

    The loss is L_cal of `args.samples` samples that the calibration did not draw. Writes oracle.csv (block by block)
    and compare.csv: of every score, and of the paper's for ε_p from 1e-12 to 1e-2, Spearman's ρ with the oracle over
    the blocks that may be dropped, the blocks that it keeps, and the loss of that network.
    """
    first, every = args.steps, tuple(range(len(dit.transformer_blocks)))
    without = [tuple(k for k in every if k != i) for i in every]
    loss = mean_losses(calibration, {kept: with_blocks(dit, kept) for kept in (every, *without)}, first, args.samples,
                       "each block left out")
    oracle = [loss[kept] - loss[every] for kept in without]
    scores = {kind: block_scores(dit, kind, fisher, args.eps_p) for kind in SALIENCIES}
    rng = np.random.default_rng(args.seed)
    scores |= {f"random {n}": rng.permutation(len(every)).tolist() for n in range(RANDOM)}
    scores["tail"] = [-i for i in every]  # the last blocks are dropped
    write_csv(args.out / "oracle.csv", ["block", "loss_increase", *scores],
              [{"block": i, "loss_increase": oracle[i]} | {k: scores[k][i] for k in scores} for i in every])
    scores = {"oracle": oracle} | scores | {
        f"paper, eps_p 1e{k}": block_scores(dit, "paper", fisher, 10.0 ** k) for k in range(-12, -1)}
    sets = {name: tuple(choose(values, keep)) for name, values in scores.items()}
    networks = {kept: with_blocks(dit, kept) for kept in sets.values()}
    networks["mask"] = masked(dit, sum(p.numel() for p in networks[sets["oracle"]].parameters()))
    loss |= mean_losses(calibration, networks, first, args.samples, "each choice")
    rows = [{"score": "unpruned", "loss": loss[every], "kept": "all"}] + [
        {"score": name, "correlation": rank_correlation(scores[name][1:-1], oracle[1:-1]), "loss": loss[kept],
         "kept": " ".join(map(str, kept))} for name, kept in sets.items()]
    rows.append({"score": "unstructured magnitude mask", "loss": loss["mask"], "kept": "all, masked"})
    write_csv(args.out / "compare.csv", ["score", "correlation", "loss", "kept"], rows)
    counts = [((f < args.eps_p).sum().item(), f.numel()) for f in fisher.values()]
    below = sum(n for n, _ in counts) / sum(n for _, n in counts)
    print(f"{args.samples} samples; F lies below ε_p = {args.eps_p:g} for {below:.1%} of the weights\n"
          f"{'score':<28} {'ρ(oracle)':>9} {'loss':>9} {'increase':>9}  kept")
    for row in rows:
        rho = f"{row['correlation']:9.3f}" if "correlation" in row else " " * 9
        print(f"{row['score']:<28} {rho} {row['loss']:9.4f} {row['loss'] / loss[every] - 1:9.1%}  {row['kept']}")


def heal(args, about):
    """Train an adapter on the pruned model by train.py and merge it into --out/healed. The paper does not do this.

    Returns train.py's exit code. --resume continues the same run, whose name has the pruned model's fingerprint.
    """
    out = args.out.resolve()
    name = out / f"heal-{fingerprint(out / 'transformer')[:8]}"
    same = ("protocol", "timestep", "tags", "suffix", "lpips", "crop", "dtype", "workers", "seed", "val",
            "checkpointing", *(["lq"] if args.lq else []))
    argv = ["--data", *args.data, "--model", out, "--name", name, "--steps", args.heal, "--device", args.device.type]
    argv += [word for option in same for word in (f"--{option}", getattr(args, option))]
    if code := train.main([str(a) for a in argv] + ["--resume"] * (name / "state.pt").exists()):
        return code
    model = SanaSR.from_pretrained(out, args.device, DTYPES[args.dtype], adapter=name / "adapter.safetensors")
    steps = int(model.metadata["step"])  # more than args.heal where an earlier run had more
    link_parts(out, out / "healed")
    save_module(model.dit, out / "healed" / "transformer", metadata=about | {"healed_steps": steps})
    print(f"healed in {steps} steps, merged: {args.out}/healed")
    return 0


def mean_scores(args, pairs, model, adapter=None):
    """{metric: mean over `pairs`} of the model of that name or folder."""
    tagger = args.tags if args.tags in ("ram", "dape") else "none"
    prompts = find_tags(tagger, [p.name for p in pairs], lambda i: bicubic(read_rgb(pairs[i].lr)), args.device)
    model = load_model(model, args.device, DTYPES[args.dtype], adapter, "auto")
    rows = evaluate(model, pairs, pick(args.metrics, True), device=args.device, prompts=prompts, suffix=args.suffix,
                    timestep=args.timestep)
    return {name: value for name, value in mean(rows).items() if name != "image"}


def relative_drop(metric, before, after):
    """How much worse `after` is, relative to `before`; negative where it is better."""
    return METRICS[metric].sign * (before - after) / max(abs(before), 1e-12)


def validate(args):
    """Score the pruned (and the healed) model against the unpruned one on --pairs, or on crops of held-out photos.

    Writes validation.csv. Returns the exit code: 0 where no metric of the pruned model is over 3 % worse.
    """
    pairs = folder_pairs(*args.pairs or (args.out / "val" / "lr", args.out / "val" / "hr"))
    before = mean_scores(args, pairs, args.model, args.adapter)
    models = {"pruned": args.out} | ({"healed": args.out / "healed"} if args.heal else {})
    rows = [{"model": name, "metric": metric, "unpruned": before[metric], "value": value,
             "drop": (drop := relative_drop(metric, before[metric], value)), "passed": int(drop <= MAX_DROP)}
            for name, folder in models.items() for metric, value in mean_scores(args, pairs, folder).items()]
    write_csv(args.out / "validation.csv", list(rows[0]), rows)
    print(f"{'model':<8} {'metric':<12} {'unpruned':>10} {'value':>10} {'drop':>8}")
    for row in rows:
        print(f"{row['model']:<8} {row['metric']:<12} {row['unpruned']:10.4f} {row['value']:10.4f} {row['drop']:8.2%}  "
              f"{'pass' if row['passed'] else 'FAIL'}")
    passed = {name: all(row["passed"] for row in rows if row["model"] == name) for name in models}
    print("; ".join(f"{name}: {'passed' if ok else 'failed'} (at most {MAX_DROP:.0%} worse in any metric)"
                    for name, ok in passed.items()))
    return 0 if passed["pruned"] else 1


# --- The command ---


def prune(args):
    """The whole run, as the module's docstring says. Returns the exit code."""
    runs.set_flags(repeatable=True, tf32=True)
    # the network, with its adapter merged
    own = weights.folder(args.model, DTYPES[args.dtype]) / "adapter.safetensors"
    adapter = args.adapter or (own if own.is_file() else "none")
    model = load_model(args.model, args.device, DTYPES[args.dtype], adapter)
    if args.out.resolve() == model.folder.resolve():
        raise UserError(f"--out {args.out} is the model itself")
    if not model.metadata and args.adapter != "none":
        print("note: the model has no adapter; its transformer is pruned as it is", file=sys.stderr)
    args.protocol = args.protocol or model.metadata.get("protocol", "hq")
    fill_defaults(args, model, model.metadata)
    keep = room(model.dit, args.keep, args.budget)
    settings = {"the model": fingerprint(model.folder / "transformer"),
                "the adapter": "none" if adapter == "none" else weights.sha256(Path(adapter))}

    # the photos, and F
    fisher = None
    if args.calibrates or (args.validate and not args.pairs):
        data = TrainingData(args, args.out, args.protocol, val_folder=args.out / "val" if args.validate else None)
    if args.validate and not (args.pairs or data.pairs):
        raise UserError("--validate: no photo is held out; see --val, or name pictures by --pairs LR HR")
    if args.calibrates:
        calibration = Calibration(args, model, data)
        settings |= {k: getattr(args, k) for k in SETTINGS} | data.fingerprints
        print(f"{data.report}; {args.model}, τ {args.timestep:g}, LPIPS {args.lpips}, {args.dtype} on {args.device}")
        fisher = calibrate(args, model.dit, calibration, settings)

    # the choice
    scores = block_scores(model.dit, args.saliency, fisher, args.eps_p)
    kept = choose(scores, keep)
    about = settings | {k: getattr(args, k) for k in ("model", "protocol", "timestep", "suffix", "saliency", "eps_p")}
    about |= {"steps": args.steps * args.calibrates, "scores": scores, "kept": kept, "torch": torch.__version__}
    write_model(args, model, scores, kept, about)
    if args.compare:
        compare(args, calibration, model.dit, fisher, keep)
    if args.heal and (code := heal(args, about)):
        return code
    return validate(args) if args.validate else 0


def parser():
    p = runs.parser(__doc__)
    add, size = p.add_argument, p.add_mutually_exclusive_group().add_argument
    add_data_options(add)
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    add("--adapter", metavar="PATH", help="LoRA weights to merge (default: the model's own, if it has any; none: none)")
    add("--out", type=Path, default=Path("runs/pruned"), metavar="DIR", help="the folder to write")
    add("--resume", action="store_true", help="go on with what lies in --out")
    size("--keep", type=int, metavar="N", help="blocks to keep (default: 16 of 28, as in the paper)")
    size("--budget", type=float, metavar="N", help="keep what fits into N parameters of the whole transformer")
    add("--saliency", choices=list(SALIENCIES), default="paper", help="what scores the blocks")
    add("--eps-p", type=float, default=1e-8, metavar="ε", help="of the paper's score")
    add("--steps", type=int, default=400, help="samples of the calibration")
    add("--protocol", choices=["hq", "lq"], help="as in train.py (default: the adapter's, else hq)")
    add("--timestep", type=float, metavar="N", help="τ in (0, 1000] (default: the adapter's, else the protocol's)")
    add("--lpips", choices=["vgg", "alex"], help="network of the LPIPS loss, as in train.py")
    add("--checkpointing", choices=["none", "decoder", "all"], default="none", help="as in train.py")
    runs.add_device_options(add, workers=4)
    add("--compare", action="store_true", help="also measure every score, and ε_p, by the loss without each block")
    add("--samples", type=int, default=16, help="that --compare measures the loss on")
    add("--heal", type=int, default=0, metavar="N", help="also train an adapter on it for N steps, merged into healed/")
    add("--validate", action="store_true", help="also score it: no metric may be over 3 %% worse, else exit code 1")
    add("--pairs", nargs=2, metavar=("LR", "HR"), help="folders for --validate (default: made of held-out photos)")
    add("--metrics", metavar="LIST", help="for --validate, as in eval.py")
    p.set_defaults(batch=1, accumulate=1, usm=False, mild=0.0)  # as train.py's samples are drawn
    return p


def parse(argv=None):
    """The arguments. Raises UserError in one line for what does not fit."""
    args = (p := parser()).parse_args(argv)
    args.calibrates = args.saliency != "magnitude" or args.compare
    if not args.data and (args.calibrates or args.heal or (args.validate and not args.pairs)):
        p.error("--data names the folders of photos; only --saliency magnitude does without")
    runs.check_ranges(args)
    runs.resolve_device(args)
    if not args.resume and any((args.out / name).exists() for name in ("calibration.pt", "transformer")):
        raise UserError(f"{args.out} holds a model already: add --resume to go on, or choose another --out")
    if (args.out / "adapter.safetensors").exists():
        raise UserError(f"{args.out} holds an adapter.safetensors, which would be applied to the pruned model")
    return args


@runs.command
def main(argv=None):
    args = parse(argv)
    with runs.claimed(args.out):
        return prune(args)


if __name__ == "__main__":
    sys.exit(main())
