"""LinearSR's flow matching: the network and its loss, the pairs that it is trained on, and what is measured of it.

    z_t = (1 − t)·z_H + t·ε,  t = 3u / (1 + 2u),  u uniform on the interval         the sampler's steps, equally likely
    L = ‖ v_θ(z_t, t, E_conv(x), c, m) − (ε − z_H) ‖²
"""
from __future__ import annotations

import hashlib
import json
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from linearsr import sample, shifted, unshifted
from objective import judged, put
from photos.degrade import DEGRADE_VERSION, enlarge, to_image, to_tensor
from photos.pairs import Pairs
from runs import from_first, outlive_signals, ranks
from weights.files import open_weights, save_tensors

SHARD = 256  # pairs in a file

# --- The network and its loss ---


class Network(nn.Module):
    """Transformer and stem, all that LinearSR trains; t in [0, 1], lr: B,3,8h,8w in [-1, 1].

    seen: B of 0 and 1, whether a sample's LR picture is seen; without it the transformer is a prior as SANA's.
    """

    def __init__(self, dit, stem):
        super().__init__()
        self.dit, self.stem = dit, stem

    def forward(self, z, t, c, m, lr, seen=None):
        e = self.stem(lr)
        return self.dit(z, 1000 * t, c, m, e if seen is None else e * seen.to(e.dtype)[:, None, None, None])


def flow_loss(network, z, t, noise, c, m, lr, seen=None):
    """‖v − (ε − z_H)‖² per value, one for each sample: B."""
    s = t[:, None, None, None]
    v = network((1 - s) * z + s * noise, t, c, m, lr, seen).float()
    return (v - (noise - z)).square().mean((1, 2, 3))


def interval(k, boundaries):
    """(lower, upper) end of expert k's interval of t; None: of all of them."""
    edges = 0.0, *boundaries, 1.0
    return (0.0, 1.0) if k is None else (edges[k], edges[k + 1])


def times(u, ends):
    """u, uniform in [0, 1), to t in the interval `ends`, as often as the sampler's steps fall there."""
    low, high = (unshifted(t) for t in ends)
    return shifted(low + u * (high - low))


# --- The encoded pairs ---


class EightBitPairs(Pairs):
    """Pair n of `Pairs` as 8-bit pictures, with the index of its photo."""

    def __getitem__(self, n):
        i, _, lr, hr = self.sample(n)
        return {"lr": (lr * 255).round().byte(), "hr": (hr * 255).round().byte(), "photo": i}


class EncodedPairs:
    """z_H, LR picture and photo of every pair: made once, kept in files of SHARD pairs, held in the device's memory."""

    def __init__(self, pairs, count, folder, latents, device, workers):
        """pairs: `EightBitPairs`. A file that is missing is made again. With several ranks each makes its share."""
        rank, world = ranks()
        parts = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
        files = [folder / f"{part.start:06d}-{part.stop:06d}.safetensors" for part in parts]
        lacking = from_first(lambda: [k for k, file in enumerate(files) if not file.exists()])[rank::world]
        for k in tqdm(lacking, f"encoding {count} pairs", unit="file", disable=rank > 0 or not lacking):
            loader = DataLoader(pairs, 8, sampler=parts[k], num_workers=workers, worker_init_fn=outlive_signals)
            with torch.inference_mode():
                rows = [(latents.encode(batch.pop("hr").to(device).float() / 127.5 - 1).half().cpu(), batch["lr"],
                         batch["photo"]) for batch in loader]
            z, lr, photo = map(torch.cat, zip(*rows, strict=True))
            save_tensors({"z": z, "lr": lr, "photo": photo}, files[k])
        if world > 1:
            dist.barrier()
        opened = [open_weights(file) for file in files]
        self.z, self.lr, self.photo = (torch.cat([f.get_tensor(key) for f in opened]) for key in ("z", "lr", "photo"))
        self.count, self.device, self.z, self.lr = count, device, self.z.to(device), self.lr.to(device)

    def __getitem__(self, indices):
        """indices: B -> z: B,C,h,w float32; lr: B,3,8h,8w in [-1, 1], both on the device; photo: B, in host memory."""
        indices = torch.as_tensor(indices)
        here = put(indices, self.device)
        return self.z[here].float(), self.lr[here].float() / 127.5 - 1, self.photo[indices]


def pairs_key(vae, args, data):
    """A hash of what the encoded pairs depend on; the decoder is not part of it. Equal keys share their pairs.

    args: crop, mild and pairs_seed; data: a TrainingData.
    """
    hashed = hashlib.sha256(json.dumps([DEGRADE_VERSION, vae.config["scaling_factor"], args.crop, args.mild,
                                        args.pairs_seed, data.fingerprints["the photos"],
                                        data.fingerprints["the LR pictures"]]).encode())
    for x in vae.encoder.state_dict().values():
        hashed.update(x.float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:12]


# --- What is measured ---


class Held:
    """Pairs that are never trained on, with what is drawn for them, the same at every validation."""

    def __init__(self, pairs, prompts, latents, conditions, device):
        """pairs: [(name, LR image, HR image)], all of one size; prompts: one each."""
        self.lr = torch.stack([to_tensor(lr) * 2 - 1 for _, lr, _ in pairs]).to(device)
        self.hr = torch.stack([to_tensor(hr) * 2 - 1 for _, _, hr in pairs])
        self.z = torch.cat([latents.encode(x[None].to(device)) for x in self.hr])
        self.latents, (self.c, self.m) = latents, conditions(prompts)

    def parts(self, *more):
        """z, c, m, lr and what is given besides, of 16 pairs at a time."""
        return zip(*(x.split(16) for x in (self.z, self.c, self.m, self.lr, *more)), strict=True)

    @torch.no_grad()
    def flow(self, network, ends, draws=1):
        """Losses of `network` at `draws` times in the interval `ends` for each pair: pairs,draws."""
        generator, losses = torch.Generator().manual_seed(0), []
        for z, c, m, lr in self.parts():
            n, columns = len(z), []
            for d in range(draws):
                u = (torch.arange(n) + n * d + torch.rand(n, generator=generator)) / (n * draws)
                noise = torch.randn(z.shape, generator=generator).to(z.device)
                columns.append(flow_loss(network, z, times(u, ends).to(z.device), noise, c, m, lr))
            losses.append(torch.stack(columns, 1))
        return torch.cat(losses).cpu()

    @torch.no_grad()
    def restored(self, velocity, steps, lpips):
        """({mean PSNR, LPIPS}, a grid x_L | x̂ | x_H of six) of what `LinearSR.restore` makes of the pairs.

        velocity: (z, t, c, m, lr) -> v.
        """
        noise, scores, rows = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0)), [], []
        for z, c, m, lr, hr, drawn in self.parts(self.hr, noise):
            found = sample(partial(velocity, c=c, m=m, lr=lr), drawn.to(z.device), steps)
            for one, small, x_h in zip(found.split(1), lr.cpu(), hr.to(z.device).split(1), strict=True):
                x_l = enlarge(small / 2 + 0.5)[None].to(z.device)
                _, *score, row = judged(self.latents.decode(one), x_l, x_h, lpips)
                scores.append(score)
                rows.append(row)
        means = [sum(column) / len(rows) for column in zip(*scores, strict=True)]
        return dict(zip(("val_psnr", "val_lpips"), means, strict=True)), to_image(torch.cat(rows[:6], 1))


def held_flow(flow, boundaries):
    """The loss over [0, 1] of those of the intervals, each weighted by its share of u."""
    share = [unshifted(b) - unshifted(a) for a, b in (interval(k, boundaries) for k in range(len(flow)))]
    return sum(a * b for a, b in zip(flow, share, strict=True))
