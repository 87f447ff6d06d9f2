"""Makes the transformer shallower: prompt-aware structured pruning of whole blocks, Algorithm 2 of the paper.

    python prune.py --data ./hq --adapter runs/official/best.safetensors --model sana-600m-512 --out runs/pruned
    python prune.py --data ./hq --keep 16 --saliency obd --out runs/obd      # another score, another budget
    python prune.py --out runs/pruned --data ./hq --resume                   # goes on where it was stopped or killed
    python prune.py --data ./hq --out runs/pruned --resume --compare         # the scores against an oracle, a table
    python prune.py --data ./hq --out runs/pruned --resume --validate        # pruned against unpruned, metric by metric
    python prune.py --data ./hq --out runs/pruned --resume --heal 1000       # then trains an adapter on it and merges
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
import math
import os
import shutil
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

import train
import weights
from fast import load_model
from metrics import METRICS
from metrics.score import evaluate, folder_pairs, mean, pick
from objective import LAMBDA, PROTOCOLS, Conditions, Latents, fill_defaults, in_float32, load_lpips, losses
from photos.pairs import Pairs, digest, find_tags, hash_of, match_lq, photo_tags, scan, split, validation_pairs
from photos.pictures import atomically, bicubic, one_line, png, read_rgb, write_bytes
from runs import (
    DTYPES,
    Signals,
    UserError,
    batches,
    claimed,
    command,
    dtype_name,
    load_state,
    outlive_signals,
    pick_device,
    pick_dtype,
    save_state,
    workers,
    write_csv,
)
from sanasr import LinearDiT, SanaSR, build_prompt, fingerprint, save_module

SALIENCIES = ("paper", "obd", "magnitude", "random", "tail")
FROM_GRADIENTS = ("paper", "obd")  # the others need no calibration
MAX_DROP = 0.03  # of any metric, relative to the unpruned model, in its worse direction
TERMS = {name: LAMBDA[name] for name in ("mse", "lpips", "align")}  # L_rec and L_align, without L_cons

# --- The loss and its squared gradients ---


def omega(t):
    """ω(t) = 1 − log(t+1)/log(T+1), T = 1000 (Eq. 22): 1 at t = 0, 0 at t = 1000."""
    return 1 - math.log(t + 1) / math.log(1001)


def calibration_loss(f, f0, vae, batch, tau, lpips):
    """L_cal of a batch of one sample, a scalar (Eq. 21). f: the merged network; the rest as in `objective.losses`."""
    values = losses(f, f0, vae, batch, tau, lpips, TERMS)
    return omega(batch["t"].item()) * sum(TERMS[name] * value for name, value in values.items())


class Fisher:
    """Accumulates Σ_k ω(t_k)·(∂L_cal/∂w)² for every parameter of the blocks, in float32.

    A gradient is squared and freed as soon as the backward pass has it, so memory never holds more gradients than one
    block's. `sums`: {key: tensor}; `weight`: ω(t_k) of the current sample.
    """

    def __init__(self, dit):
        self.weight, self.sums = 0.0, {}
        dit.requires_grad_(False)
        for key, p in dit.transformer_blocks.named_parameters():
            p.requires_grad_(True)
            self.sums[key] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            p.register_post_accumulate_grad_hook(partial(self._add, self.sums[key]))

    def _add(self, total, p):
        g = p.grad.float()
        total.add_(g.square_(), alpha=self.weight)
        p.grad = None


def calibrate(fisher, loss_of, samples, state, steps, save, every=50):
    """Run the calibration steps that `state` does not have yet. Returns the signal that stopped it, or 0.

    loss_of: batch -> L_cal; samples(first, signals): the batches from number `first` on; state: {"step", …}, updated;
    save(): writes state and sums; it is called every `every` steps, at the end and when interrupted.
    """
    first = state["step"]
    with Signals() as signals, tqdm(total=steps, initial=first, desc="calibrating", dynamic_ncols=True) as bar:
        for batch in samples(first, signals):
            name = batch.pop("name")[0]
            fisher.weight = omega(batch["t"].item())
            loss = loss_of(batch)
            if not math.isfinite(loss.item()):
                raise UserError(f"step {state['step'] + 1}: the loss is {loss.item()} on {name}; nothing of it was "
                         "added, the last save is whole")
            loss.backward()
            state["step"] += 1
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            bar.update()
            if signals.caught:
                break
            if state["step"] % every == 0 and state["step"] < steps:
                save()
        caught = signals.caught
        if state["step"] > first:
            save()
    return caught


# --- Scores, and the choice under the budget ---


@torch.no_grad()
def block_scores(dit, kind, fisher=None, eps=1e-8, seed=0):
    """One score for each block, a list of floats. Higher scores are kept first.

    paper: Σ w²/(F+ε_p) (Eq. 24); obd: ½ Σ F·w² (Optimal Brain Damage); magnitude: Σ w²; random: by the seed;
    tail: earlier blocks score higher. fisher: {key within transformer_blocks: F}, for paper and obd.
    """
    count = len(dit.transformer_blocks)
    if kind == "random":
        return np.random.default_rng(seed).permutation(count).astype(float).tolist()
    if kind == "tail":
        return [float(count - i) for i in range(count)]
    scores = [0.0] * count
    for key, p in dit.transformer_blocks.named_parameters():
        value = p.float().square()
        if kind == "paper":
            value /= fisher[key] + eps
        elif kind == "obd":
            value *= fisher[key] / 2
        scores[int(key.partition(".")[0])] += value.sum(dtype=torch.float64).item()
    return scores


def choose(scores, size, fixed, budget):
    """Indices of the blocks to keep, ascending: first and last, then greedily by falling score (Eq. 11).

    size: parameters of each block. All must be equal: greedy then solves the knapsack problem exactly.
    fixed: parameters outside the blocks; budget: of the whole transformer. Raises ValueError for a budget that does not
    hold two blocks, or holds all.
    """
    count, total = len(scores), fixed + sum(size)
    assert len(set(size)) == 1, f"blocks of different sizes, {sorted(set(size))}: greedy would not be exact"
    room = int((budget - fixed) // size[0])
    if room < 2:
        raise ValueError(f"a budget of {budget:.6g} parameters does not hold the first and the last block, which are "
                         f"always kept: it takes {fixed + 2 * size[0]} at least")
    if room >= count:
        raise ValueError(f"a budget of {budget:.6g} parameters leaves nothing to drop: the transformer has {total} in "
                         f"{count} blocks; --keep N keeps N blocks, 2 to {count - 1}")
    inner = sorted(range(1, count - 1), key=lambda i: (-scores[i], i))
    return sorted([0, count - 1, *inner[:room - 2]])


def sizes(dit):
    """([parameters of each block], parameters outside them)."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in dit.transformer_blocks]
    return blocks, sum(p.numel() for p in dit.parameters()) - sum(blocks)


def with_blocks(dit, kept):
    """A LinearDiT of only the blocks `kept`, in that order; it shares the weights of `dit`."""
    with torch.device("meta"):
        small = LinearDiT(dit.config | {"num_layers": len(kept)})
    old, state = dit.state_dict(), {}
    for key in small.state_dict():
        part, _, rest = key.partition(".")
        if part == "transformer_blocks":
            i, _, rest = rest.partition(".")
            state[key] = old[f"{part}.{kept[int(i)]}.{rest}"]
        else:
            state[key] = old[key]
    small.load_state_dict(state, assign=True)
    return small.eval().requires_grad_(False)


# --- The folder ---


def link_parts(source, out):
    """Put vae/, text_encoder/, tokenizer/ and scheduler/ of `source` into `out`, as hard links or copies."""
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in sorted((source / part).glob("*")):
            with atomically(out / part / path.name) as temporary:
                try:
                    os.link(path.resolve(), temporary)  # the Hub's cache holds links into its store
                except OSError:
                    shutil.copyfile(path, temporary)


def chart(scores, kept, kind, note, width=860, height=360):
    """A bar chart of the scores: kept blocks blue, dropped ones grey; logarithmic where the scores vary widely."""
    values = np.array(scores)
    log = values.min() > 0 and values.max() > 50 * values.min()
    up = np.log10(values) if log else values
    low = math.floor(up.min()) if log else 0.0
    up = (up - low) / max(up.max() - low, 1e-300)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = 20, 64, width - 20, height - 44
    step = (right - left) / len(scores)
    draw.text((left, 8), f"Importance of each transformer block, score '{kind}'"
              + (" (logarithmic)" if log else "") + f": {min(scores):.3g} to {max(scores):.3g}", "black")
    draw.text((left, 24), note, "black")
    for x, colour, text in ((left, "#1040c0", f"kept ({len(kept)})"),
                            (left + 110, "#c0c0c0", f"dropped ({len(scores) - len(kept)})")):
        draw.rectangle((x, 44, x + 10, 54), colour)
        draw.text((x + 16, 43), text, "black")
    for i, value in enumerate(up):
        x = left + i * step
        draw.rectangle((x + 0.12 * step, bottom - 2 - value * (bottom - top - 4), x + 0.88 * step, bottom),
                       "#1040c0" if i in kept else "#c0c0c0")
        draw.text((x + step / 2, bottom + 4), str(i), "black", anchor="ma")
    draw.line((left, bottom, right, bottom), "black")
    draw.text((width / 2, bottom + 22), "block, from the input to the output (the first and the last are always kept)",
              "black", anchor="ma")
    return canvas


def write_model(args, model, scores, kept, provenance):
    """Write the pruned model, saliency.csv and saliency.png. Raises UserError in one line."""
    rank = {i: n for n, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1)}
    pruned = with_blocks(model.dit, kept)
    try:
        link_parts(model.folder, args.out)
        save_module(pruned, args.out / "transformer", metadata=provenance)
    except OSError as error:
        raise UserError(f"{args.out}: the model cannot be written ({error.strerror or error})")
    write_csv(args.out / "saliency.csv", ["block", "score", "rank", "kept"],
              [{"block": i, "score": s, "rank": rank[i], "kept": int(i in kept)} for i, s in enumerate(scores)])
    before, after = (sum(p.numel() for p in dit.parameters()) / 1e6 for dit in (model.dit, pruned))
    note = f"{len(kept)} of {len(scores)} blocks kept: {after:.2f} of {before:.2f} M parameters"
    write_bytes(args.out / "saliency.png", png(chart(scores, kept, args.saliency, note)))
    print(f"{note}; dropped {', '.join(str(i) for i in range(len(scores)) if i not in kept)}; {args.out}")


# --- The scores against an oracle ---


def rank_correlation(a, b):
    """Spearman's ρ of two lists of numbers; equal numbers are ranked in their order."""
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@torch.no_grad()
def masked(dit, nonzero):
    """Unstructured magnitude pruning, one threshold for all blocks: a copy of `dit` with all its blocks, in which the
    smallest weights of the blocks are zero, so that `nonzero` parameters of the whole transformer are left."""
    copy = with_blocks(dit, range(len(dit.transformer_blocks)))
    flat = torch.cat([p.flatten() for p in copy.transformer_blocks.parameters()])
    size = flat.abs()
    drop = sum(p.numel() for p in copy.parameters()) - int(nonzero)
    threshold = size.kthvalue(drop).values
    flat[size < threshold] = 0
    ties = (size == threshold).nonzero()[:, 0]  # in bfloat16 many are equal
    flat[ties[:drop - int((size < threshold).sum())]] = 0
    state, start = {}, 0
    for key, p in copy.transformer_blocks.named_parameters():
        state[key] = flat[start:start + p.numel()].view(p.shape)
        start += p.numel()
    copy.transformer_blocks.load_state_dict(state, assign=True)
    return copy


@torch.no_grad()
def mean_losses(calibration, networks, first, count, what):
    """{name: LinearDiT} -> {name: mean L_cal over the `count` samples from number `first` on}."""
    totals, args = dict.fromkeys(networks, 0.0), calibration.args
    with Signals() as signals, tqdm(total=count * len(networks), desc=what, dynamic_ncols=True) as bar:
        for batch in calibration.samples(first, first + count, signals):
            vae = Latents(calibration.model.vae, calibration.model.scaling_factor)
            vae.encode = lru_cache(vae.encode)  # x_L and x_H are the same for every network
            for name, dit in networks.items():
                if signals.caught:
                    break
                totals[name] += calibration.loss(dit, batch, vae).item() / count
                bar.update()
    if signals.caught:  # the batches may have ended because of it
        print(f"interrupted; the pruned model in {args.out} is whole, the comparison starts anew")
        sys.exit(128 + signals.caught)
    return totals


def compare(args, calibration, dit, fisher, budget):
    """Compare every score with an oracle: the increase of the loss without each block. Extends the paper's Table 6.

    The loss is L_cal on `args.samples` samples that the calibration did not draw. Writes oracle.csv (block by block)
    and compare.csv (score by score: Spearman's ρ with the oracle over the blocks that may be dropped, the mean loss of
    the pruned network and the kept set), the paper's score for ε_p from 1e-12 to 1e-2 among them.
    """
    (blocks, fixed), first = sizes(dit), args.steps
    every = tuple(range(len(blocks)))
    without = [tuple(k for k in every if k != i) for i in every]
    loss = mean_losses(calibration, {kept: with_blocks(dit, kept) for kept in (every, *without)}, first, args.samples,
                       "each block left out")
    oracle = [loss[kept] - loss[every] for kept in without]
    score = partial(block_scores, dit, fisher=fisher, seed=args.seed)
    scores = {"oracle": oracle} | {kind: score(kind, eps=args.eps_p) for kind in SALIENCIES}
    write_csv(args.out / "oracle.csv", ["block", "loss_increase", *SALIENCIES],
              [{"block": i, "loss_increase": oracle[i]} | {k: scores[k][i] for k in SALIENCIES} for i in every])
    scores |= {f"paper, eps_p 1e{k}": score("paper", eps=10.0 ** k) for k in range(-12, -1)}

    sets = {name: tuple(choose(values, blocks, fixed, budget)) for name, values in scores.items()}
    left = fixed + len(sets["oracle"]) * blocks[0]
    networks = {kept: with_blocks(dit, kept) for kept in sets.values()} | {"mask": masked(dit, left)}
    loss |= mean_losses(calibration, networks, first, args.samples, "each choice")
    rows = [{"score": "unpruned", "loss": loss[every]}] + [
        {"score": name, "correlation": rank_correlation(scores[name][1:-1], oracle[1:-1]), "loss": loss[kept],
         "kept": " ".join(map(str, kept))} for name, kept in sets.items()]
    rows.append({"score": "unstructured magnitude mask", "loss": loss["mask"], "kept": "all, masked"})
    write_csv(args.out / "compare.csv", ["score", "correlation", "loss", "kept"], rows)
    small = [(f < args.eps_p).float().mean(dtype=torch.float64).item() * f.numel() for f in fisher.values()]
    print(f"{args.samples} samples; F lies below ε_p = {args.eps_p:g} for "
          f"{sum(small) / sum(f.numel() for f in fisher.values()):.1%} of the weights\n"
          f"{'score':<28} {'ρ(oracle)':>9} {'loss':>9} {'increase':>9}  kept")
    for row in rows:
        rho = f"{row['correlation']:9.3f}" if "correlation" in row else " " * 9
        rise = row["loss"] / loss[every] - 1
        print(f"{row['score']:<28} {rho} {row['loss']:9.4f} {rise:9.1%}  {row.get('kept', '')}")


# --- Healing and validation ---


def heal(args, provenance):
    """Train an adapter on the pruned model for `args.heal` steps by train.py and merge it into --out/healed.

    The paper does not do this. Returns train.py's exit code. The run's name in --out contains the fingerprint of the
    pruned model, so --resume continues it only for the same pruned model.
    """
    out = args.out.resolve()
    name = out / f"heal-{fingerprint(out / 'transformer')[:8]}"
    argv = ["--data", *args.data, "--model", out, "--name", name, "--steps", args.heal, "--protocol", args.protocol,
            "--timestep", args.timestep, "--tags", args.tags, "--suffix", args.suffix, "--lpips", args.lpips, "--crop",
            args.crop, "--device", args.device.type, "--dtype", args.dtype, "--workers", args.workers, "--seed",
            args.seed, "--val", args.val, *(["--lq", args.lq] if args.lq else []),
            *["--checkpointing"] * args.checkpointing, *["--resume"] * (name / "state.pt").exists()]
    if code := train.main([str(a) for a in argv]):
        return code
    model = SanaSR.from_pretrained(out, args.device, DTYPES[args.dtype], adapter=name / "adapter.safetensors")
    steps = int(model.metadata["step"])  # more than args.heal where an earlier run had more
    link_parts(out, out / "healed")
    save_module(model.dit, out / "healed" / "transformer", metadata=provenance | {"healed_steps": steps})
    print(f"healed in {steps} steps, merged: {args.out}/healed")
    return 0


def mean_scores(args, pairs, model, adapter=None):
    """{metric: mean over `pairs`} of the model of that name or folder."""
    names = pick(args.metrics, True)
    tagger = args.tags if args.tags in ("ram", "dape") else "none"
    prompts = find_tags(tagger, [p.name for p in pairs], lambda i: bicubic(read_rgb(pairs[i].lr)), args.device)
    model = load_model(model, args.device, DTYPES[args.dtype], adapter, "auto")
    row = mean(evaluate(model, pairs, names, device=args.device, prompts=prompts, suffix=args.suffix,
                        timestep=args.timestep))
    return {name: row[name] for name in names if name in row}


def relative_drop(metric, before, after):
    """How much worse `after` is, relative to `before`; negative where it is better."""
    worse = before - after if METRICS[metric].better == "higher" else after - before
    return worse / max(abs(before), 1e-12)


def validate(args):
    """Score the pruned (and the healed) model against the unpruned one. It passes if no metric is over 3 % worse.

    Pictures: `--pairs LR HR`, else central crops of the held-out photos. Writes validation.csv. Returns the exit code:
    0 where the pruned model passes every metric.
    """
    if args.pairs:
        lr, hr = args.pairs
    else:
        _, held, lq, _ = find_photos(args)
        if not held:
            raise UserError("--validate: no photo is held out; see --val, or name pictures by --pairs LR HR")
        validation_pairs(held, lq, args.crop, args.seed, args.out / "val")
        lr, hr = args.out / "val" / "lr", args.out / "val" / "hr"
    try:
        pairs = folder_pairs(lr, hr)
        before = mean_scores(args, pairs, args.model, args.adapter)
    except (ValueError, weights.Unavailable) as error:
        raise UserError(f"--validate: {one_line(error)}")
    passed, rows = {}, []
    for name, folder in (("pruned", args.out), *([("healed", args.out / "healed")] if args.heal else [])):
        after = mean_scores(args, pairs, folder)
        rows += [{"model": name, "metric": k, "unpruned": before[k], "value": after[k],
                  "drop": (drop := relative_drop(k, before[k], after[k])), "passed": int(drop <= MAX_DROP)}
                 for k in before]
        passed[name] = all(row["passed"] for row in rows if row["model"] == name)
    write_csv(args.out / "validation.csv", list(rows[0]), rows)
    print(f"{'model':<8} {'metric':<12} {'unpruned':>10} {'value':>10} {'drop':>8}")
    for row in rows:
        print(f"{row['model']:<8} {row['metric']:<12} {row['unpruned']:10.4f} {row['value']:10.4f} {row['drop']:8.2%}  "
              f"{'pass' if row['passed'] else 'FAIL'}")
    print("; ".join(f"{name}: {'passed' if ok else 'failed'} (at most {MAX_DROP:.0%} worse in any metric)"
                    for name, ok in passed.items()))
    return 0 if passed["pruned"] else 1


# --- The command ---


def load_networks(args):
    """(SanaSR with its adapter merged, f0: the prior without it). Raises UserError in one line."""
    model = load_model(args.model, args.device, DTYPES[args.dtype], args.adapter)
    if not model.metadata and args.adapter != "none":
        print("note: the model has no adapter; its transformer is pruned as it is", file=sys.stderr)
    return model, LinearDiT.from_pretrained(model.folder / "transformer", model.dtype, args.device)


def adapter_hash(args, folder):
    """SHA-256 of the adapter that `load_networks` merges, or "none"."""
    path = Path(args.adapter or folder / "adapter.safetensors")
    return weights.sha256(path) if path.is_file() else "none"


class Calibration:
    """All that L_cal of a sample needs: photos, prompts and the networks around the one that is pruned."""

    def __init__(self, args, model, prior):
        self.args, self.model = args, model
        model.vae.requires_grad_(False)
        for part in (model.dit, prior, model.vae.decoder):
            part.checkpointing = args.checkpointing
        lpips, args.lpips = load_lpips(args.lpips)
        self.lpips, self.f0 = lpips.to(args.device), in_float32(prior)
        self.vae = Latents(model.vae, model.scaling_factor)
        photos, _, lq, report = find_photos(args)
        tags = photo_tags(args.tags, args.protocol, photos, lq, args.out / "tags.csv")
        if tags is None:  # the tagger's weights are unavailable
            args.tags, tags = "none", [[]] * len(photos)
        prompts = [build_prompt(line, args.suffix) for line in tags]
        self.conditions = Conditions(model)
        self.conditions.prepare(sorted(set(prompts)))
        side = args.crop // model.vae.factor
        self.pairs = Pairs(photos, prompts, args.crop, (model.dit.config["in_channels"], side, side),
                           PROTOCOLS[args.protocol][1], args.seed, lq)
        self.digests = {"photos_sha256": digest(photos), "lq_sha256": hash_of(
            [weights.sha256(lq[p.path]) if p.path in lq else "" for p in photos]), "prompts_sha256": hash_of(prompts)}
        print(f"{report}; {args.model}, τ {args.timestep:g}, LPIPS {args.lpips}, {args.dtype} on {args.device}")

    def samples(self, first, last, signals):
        """Yields batches of one sample, numbers `first` to `last` - 1; with "name", a list of one."""
        loader = DataLoader(self.pairs, batch_sampler=[[n] for n in range(first, last)], num_workers=self.args.workers,
                            worker_init_fn=outlive_signals)
        for batch in batches(loader, signals):
            name, prompts = batch.pop("name"), batch.pop("prompt")
            batch = {k: v.to(self.args.device) for k, v in batch.items()}
            batch["c"], batch["m"] = self.conditions(prompts)
            yield batch | {"name": name}

    def loss(self, dit, batch, vae=None):
        """L_cal of a batch with `dit` in the place of the merged network, a scalar."""
        return calibration_loss(in_float32(dit), self.f0, vae or self.vae, batch, self.args.timestep, self.lpips)


def find_photos(args):
    """(photos, held-out photos for validation, {photo: its LR picture}, a report)."""
    photos, report = scan(args.data, args.crop, args.out / "data.json", args.workers)
    photos, held = split(photos)
    lq = match_lq(photos + held, args.lq) if args.lq else {}
    return photos, held[:args.val], lq, f"{report}; {len(held)} held out"


# what F depends on; the number of steps may grow
FISHER_SETTINGS = ("model", "base_fingerprint", "adapter_sha256", "photos_sha256", "protocol", "timestep", "suffix",
                   "lpips", "crop", "seed", "dtype", "tags", "prompts_sha256", "lq_sha256")


def measure_fisher(args, model, calibration, settings):
    """F over `args.steps` samples, {key: tensor}; continues from calibration.pt. Exits when it is interrupted."""
    path, state, fisher = args.out / "calibration.pt", {"step": 0, "settings": settings}, Fisher(model.dit)
    if args.resume and path.exists():
        saved = load_state(path, damaged="delete it to calibrate anew", keys=("step", "settings", "sums"))
        if changed := [k for k in FISHER_SETTINGS if saved["settings"].get(k) != settings[k]]:
            raise UserError(f"--resume: {', '.join(changed)} changed since {path} was begun; choose another --out")
        if saved["step"] > args.steps:
            raise UserError(f"--resume: {path} holds {saved['step']} steps already, more than --steps {args.steps}")
        state["step"] = saved["step"]
        try:
            for key, total in fisher.sums.items():
                total.copy_(saved["sums"][key])
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"{path} does not fit this transformer; delete it to calibrate anew")

    def save():
        save_state(path, state | {"sums": fisher.sums})
    caught = calibrate(fisher, lambda batch: calibration.loss(model.dit, batch),
                       lambda first, signals: calibration.samples(first, args.steps, signals), state, args.steps, save)
    if caught:
        print(f"interrupted; step {state['step']} is saved, --resume goes on")
        sys.exit(128 + caught)
    model.dit.requires_grad_(False)
    return {key: total / state["step"] for key, total in fisher.sums.items()}


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", nargs="+", metavar="DIR", help="folders of photos to calibrate with, searched recursively")
    add("--lq", metavar="DIR", help="real LR pictures of the same names, a quarter of the size")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    add("--adapter", metavar="PATH", help="LoRA weights to merge (default: the model's own, if it has any; none: none)")
    add("--out", type=Path, default=Path("runs/pruned"), metavar="DIR")
    add("--resume", action="store_true", help="go on with what lies in --out")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--budget", type=float, metavar="N", help="parameters of the whole transformer (default: 0.35e9; "
                      "for models below that, 16 blocks of 28)")
    size.add_argument("--keep", type=int, metavar="N", help="blocks to keep")
    add("--steps", type=int, default=400, help="samples of the calibration")
    add("--saliency", choices=SALIENCIES, default="paper")
    add("--eps-p", type=float, default=1e-8, metavar="ε", help="of the paper's score")
    add("--compare", action="store_true", help="also measure every score, the sets it keeps and the effect of ε_p "
        "against an oracle: the loss without each block")
    add("--samples", type=int, default=16, help="that --compare measures the loss on")
    add("--validate", action="store_true", help="also score the pruned model against the unpruned: no metric may be "
        "over 3 %% worse; the exit code is 1 where it fails")
    add("--pairs", nargs=2, metavar=("LR", "HR"), help="folders for --validate (default: made of held-out photos)")
    add("--metrics", metavar="LIST", help="for --validate, as in eval.py")
    add("--val", type=int, default=8, metavar="N", help="photos held out for validation, the same as in train.py")
    add("--heal", type=int, default=0, metavar="N", help="also train an adapter on the pruned model for N steps and "
        "merge it, into healed/ (not in the paper)")
    add("--protocol", choices=list(PROTOCOLS), help="as in train.py (default: the adapter's, else hq)")
    add("--timestep", type=float, metavar="N", help="τ in (0, 1000] (default: the adapter's, else the protocol's)")
    add("--tags", metavar="none|ram|dape|FILE.csv", help="as in train.py")
    add("--suffix", metavar="appendix|main|none|TEXT", help="quality words (default: the adapter's, else appendix)")
    add("--lpips", choices=["vgg", "alex"], help="network of the LPIPS loss, as in train.py")
    add("--crop", type=int, help="pixels (default: what the model was trained at, 512 for SANA-0.6B)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--checkpointing", action="store_true", help="less memory, more time: recompute activations")
    add("--workers", type=int, default=4, help="loader processes, never more than there are cores")
    add("--seed", type=int, default=0)
    return p


def parse(argv=None):
    """The arguments. Raises UserError in one line for what does not fit."""
    p = parser()
    args = p.parse_args(argv)
    args.calibrates = args.saliency in FROM_GRADIENTS or args.compare
    if not args.data and (args.calibrates or args.heal or (args.validate and not args.pairs)):
        p.error("--data names the folders of photos; only the scores magnitude, random and tail do without")
    for option in ("steps", "samples"):
        if getattr(args, option) < 1:
            p.error(f"--{option} must be positive, not {getattr(args, option)}")
    if not args.eps_p > 0:
        p.error(f"--eps-p must be positive, not {args.eps_p:g}")
    if args.timestep is not None and not 0 < args.timestep <= 1000:
        p.error(f"--timestep must lie in (0, 1000], not {args.timestep:g}")
    if args.seed < 0:
        p.error(f"--seed must not be negative, not {args.seed}")
    if not args.resume and any((args.out / name).exists() for name in ("calibration.pt", "transformer")):
        raise UserError(f"{args.out} holds a model already: add --resume to go on, or choose another --out")
    if (args.out / "adapter.safetensors").exists():
        raise UserError(f"{args.out} holds an adapter.safetensors, which would be applied to the pruned model")
    args.device = pick_device(args.device, 0)
    args.dtype = dtype_name(pick_dtype(args.dtype, args.device))
    args.workers = workers(args.workers)
    return args


def find_budget(args, dit):
    """The budget in parameters of the whole transformer. Raises UserError."""
    blocks, fixed = sizes(dit)
    if len(blocks) < 3:
        raise UserError(f"{args.model} has {len(blocks)} blocks: first and last are kept, so there is nothing to drop")
    if args.keep is not None:
        if not 2 <= args.keep < len(blocks):
            raise UserError(f"--keep {args.keep}: of {len(blocks)} blocks 2 to {len(blocks) - 1} can be kept")
        return fixed + args.keep * blocks[0]
    if args.budget is not None:
        return args.budget
    if fixed + sum(blocks) > 0.35e9:
        return 0.35e9
    return fixed + max(2, round(len(blocks) * 16 / 28)) * blocks[0]


def prune(args):
    """The whole run, as the module's docstring says. Returns the exit code."""
    torch.backends.cudnn.deterministic = True
    model, prior = load_networks(args)
    if args.out.resolve() == model.folder.resolve():
        raise UserError(f"--out {args.out} is the model itself")
    metadata = model.metadata
    args.protocol = args.protocol or metadata.get("protocol", "hq")
    fill_defaults(args, model, metadata)
    budget = find_budget(args, model.dit)
    try:  # an impossible budget is reported before hours of calibration
        choose([0.0] * len(model.dit.transformer_blocks), *sizes(model.dit), budget)
    except ValueError as error:
        raise UserError(f"{error}")

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"model": args.model, "base_fingerprint": fingerprint(model.folder / "transformer"),
                "adapter_sha256": adapter_hash(args, model.folder)}
    fisher = None
    if args.calibrates:
        calibration = Calibration(args, model, prior)
        settings |= {k: getattr(args, k) for k in FISHER_SETTINGS if hasattr(args, k)}
        settings |= calibration.digests | {"tags": args.tags if args.tags in ("none", "ram", "dape") else "file"}
        fisher = measure_fisher(args, model, calibration, settings)
    scores = block_scores(model.dit, args.saliency, fisher, args.eps_p, args.seed)
    kept = choose(scores, *sizes(model.dit), budget)
    provenance = settings | {
        "kept": kept, "scores": scores, "saliency": args.saliency, "eps_p": args.eps_p, "budget": budget,
        "steps": args.steps if args.calibrates else 0, "protocol": args.protocol, "timestep": args.timestep,
        "suffix": args.suffix, "seed": args.seed, "torch": torch.__version__}
    write_model(args, model, scores, kept, provenance)
    if args.compare:
        compare(args, calibration, model.dit, fisher, budget)
    if args.heal and (code := heal(args, provenance)):
        return code
    return validate(args) if args.validate else 0


@command
def main(argv=None):
    args = parse(argv)
    try:
        with claimed(args.out):
            return prune(args)
    except KeyboardInterrupt:  # outside the loops, which save
        print(f"interrupted; every file in {args.out} is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
