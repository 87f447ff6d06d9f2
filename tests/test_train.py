"""Training: every loss against another formulation, the data, and runs that are resumed, killed, stopped and split."""
import copy
import csv
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeded import seeded_state_dict

import metrics
import objective
import train
import weights
from photos import degrade, tagger
from photos.pairs import Pairs, held_out, match_lq, photo_tags, scan, split, validation_pairs
from photos.pictures import read
from runs import peak_memory
from sanasr import DCAE, LinearDiT, SanaSR, inject_lora, lora_modules, lora_parameters, save_lora

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # for the training in a process of its own
QUICK = ["--steps", "3", "--tags", "none", "--no-lpips", "--crop", "96", "--batch", "1", "--workers", "0", "--val", "0"]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def save_photo(path, width, height, seed):
    """A smooth random picture of any size, written in the format of its suffix."""
    rgb = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).resize((width, height), Image.BICUBIC).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five photos in nested folders, a duplicate, a small one, a broken one and a text."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(["a.png", "b.webp", "deep/er/c.jpg", "deep/d.png", "e.PNG"]):
        save_photo(folder / name, 128 + 8 * i, 112, i)
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    save_photo(folder / "small.png", 95, 300, 9)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("no picture at all")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder; runs/ lies in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, photos, tiny_model):
    """run(name, options…) trains the tiny model in this process and returns the run's folder."""
    def start(name, *options, code=0):
        argv = ["--data", str(photos), "--model", str(tiny_model), "--name", name, *QUICK, *map(str, options)]
        assert train.main(argv) == code
        return here / "runs" / name
    return start


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- losses -----------------------------------------------------------------------------------------------------------

def test_align_loss_is_the_divergence_of_gaussians():
    q, q_h = 2 * noise(3, 5, 4, 6) + 1, noise(3, 5, 4, 6, seed=1)
    gaussians = [torch.distributions.Normal(x.mean((2, 3)), x.std((2, 3), correction=0)) for x in (q, q_h)]
    want = torch.distributions.kl_divergence(*gaussians).mean()
    assert torch.allclose(objective.align_loss(q, q_h, eps=0.0), want, rtol=1e-12)


def test_align_loss_by_the_letter_of_its_equation():
    q, q_h, eps = noise(2, 3, 4, 4).numpy(), 0.001 * noise(2, 3, 4, 4, seed=1).numpy(), 1e-6
    total = 0.0
    for b in range(2):
        for c in range(3):
            m, m_h = q[b, c].sum() / 16, q_h[b, c].sum() / 16
            s, s_h = ((q[b, c] - m) ** 2).sum() / 16, ((q_h[b, c] - m_h) ** 2).sum() / 16
            total += math.log((s_h + eps) / (s + eps)) + (s + (m - m_h) ** 2) / (s_h + eps) - 1
    got = objective.align_loss(torch.tensor(q), torch.tensor(q_h))
    assert math.isclose(got, total / (2 * 2 * 3), rel_tol=1e-12)
    assert abs(objective.align_loss(torch.tensor(q), torch.tensor(q))) < 1e-5


def test_align_loss_gradient():
    q, q_h = noise(2, 2, 3, 3).requires_grad_(), noise(2, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda q: objective.align_loss(q, q_h), q)


def test_mse_and_consistency_are_means_of_squares():
    a, b = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    want = ((a.numpy() - b.numpy()) ** 2).sum() / 120
    assert math.isclose(objective.mse(a, b), want, rel_tol=1e-12)
    assert math.isclose(objective.consistency_loss(a, b), want, rel_tol=1e-12)


def test_noised_is_the_flow_of_each_samples_t():
    z, e = noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1)
    x = objective.noised(z, torch.tensor([0.0, 250.0]), e)
    assert torch.equal(x[0], z[0]) and torch.allclose(x[1], 0.75 * z[1] + 0.25 * e[1])


def absolute(x, y):
    """In place of LPIPS."""
    return (x - y).abs().mean((1, 2, 3))


class Double:
    """A model in float64 with a trained-looking adapter, its prior as a separate copy, and one batch."""

    def __init__(self, folder):
        model = SanaSR.from_pretrained(folder, adapter=False)
        self.vae, self.s = model.vae.double(), model.scaling_factor
        model.dit.double()
        self.frozen = copy.deepcopy(model.dit)
        self.dit = model.dit
        inject_lora(self.dit, 2, targets="attn+ffn")
        self.dit.double()
        for i, p in enumerate(lora_parameters(self.dit).values()):
            p.data = 0.1 * noise(*p.shape, seed=i)
        self.batch = {
            "x_L": noise(2, 3, 96, 96).tanh(), "x_H": noise(2, 3, 96, 96, seed=1).tanh(),
            "c": noise(2, 5, 32, seed=2), "m": torch.tensor([[1, 1, 1, 1, 0], [1] * 5]),
            "t": torch.tensor([70.0, 650.0]).double(), "noise": noise(2, 8, 3, 3, seed=3)}

    def encode(self, x):
        return self.vae.encode(x) * self.s

    def decode(self, z):
        return self.vae.decode(z / self.s)

    def prior(self, *args):
        with objective.adapters_off(self.dit):
            return self.dit(*args)

    def losses(self, terms):
        return objective.losses(self.dit, self.prior, self, self.batch, 900, absolute, terms)

    def gradient(self, terms):
        for p in lora_parameters(self.dit).values():
            p.grad = None
        values = self.losses(terms)
        sum(values.values()).backward()
        return values, [p.grad for p in lora_parameters(self.dit).values()]


@pytest.fixture
def double(tiny_model):
    return Double(tiny_model)


def test_losses_follow_algorithm_1(double):
    values, gradients = double.gradient(objective.LAMBDA)
    b, s = double.batch, 0.41407
    c, m, t = b["c"], b["m"], b["t"]
    z_l, z_h = s * double.vae.encode(b["x_L"]), s * double.vae.encode(b["x_H"])
    z = z_l - 0.9 * double.dit(z_l, torch.full((2,), 900.0).double(), c, m)
    x = double.vae.decode(z / s)
    sigma = (t / 1000)[:, None, None, None]
    noised, noised_h = ((1 - sigma) * v + sigma * b["noise"] for v in (z, z_h))
    q, q_h = double.frozen(noised, t, c, m), double.frozen(noised_h, t, c, m)   # the prior as a copy, never adapted
    want = {"mse": (x - b["x_H"]).square().mean(), "lpips": (x - b["x_H"]).abs().mean(),
            "align": objective.align_loss(q, q_h), "cons": (double.dit(noised, t, c, m) - q).square().mean()}
    assert values.keys() == want.keys()
    for k in want:
        assert torch.allclose(values[k], want[k], rtol=1e-10, atol=0), k
    theirs = torch.autograd.grad(sum(want.values()), list(lora_parameters(double.dit).values()))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(gradients, theirs, strict=True))
    assert all(p.grad is None for n, p in double.dit.named_parameters() if "lora" not in n)
    assert all(p.grad is None for p in double.vae.parameters())


@pytest.mark.parametrize("term", ["mse", "align", "cons"])
def test_gradient_of_each_term_by_differences(double, term):
    _, gradients = double.gradient({"mse": 1, term: 1})
    name, p = list(lora_parameters(double.dit).items())[3]
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            p.view(-1)[1] += step
            values.append(sum(double.losses({"mse": 1, term: 1}).values()).item())
            p.view(-1)[1] -= step
    got = gradients[3].view(-1)[1].item()
    assert got != 0 and math.isclose(got, (values[0] - values[1]) / 2e-5, rel_tol=1e-4), name


def test_lpips_in_bfloat16_judges_alike():
    lpips, x, y = metrics.LPIPS.from_pretrained("alex"), noise(2, 3, 96, 96).tanh().float(), noise(2, 3, 96, 96, seed=1)
    y = (x + 0.3 * y.float()).clamp(-1, 1)
    full, half = (objective.in_autocast(lpips, torch.device("cpu"), d) for d in (torch.float32, torch.bfloat16))
    x.requires_grad_()
    assert torch.equal(full(x, y), lpips(x, y)) and torch.allclose(full(x, y), half(x, y), rtol=0.03)
    gradients = [torch.autograd.grad(f(x, y).sum(), x)[0].flatten() for f in (full, half)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_checkpointing_changes_no_gradient(double):
    _, plain = double.gradient(objective.LAMBDA)
    double.dit.checkpointing = double.vae.decoder.checkpointing = True
    _, again = double.gradient(objective.LAMBDA)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_lambdas_and_protocols_are_the_papers():
    assert objective.LAMBDA == {"mse": 1, "lpips": 2, "align": 1, "cons": 1}
    assert objective.PROTOCOLS == {"hq": (900, (70, 650)), "lq": (999, (20, 980))}


# --- data -------------------------------------------------------------------------------------------------------------

def test_scan_drops_and_counts(photos, tmp_path):
    found, report = scan([photos, photos / "deep"], 96, tmp_path / "index.json", 2)
    assert len(found) == 5 and len({p.sha256 for p in found}) == 5
    assert report == "5 photos of 8 files; skipped: 1 duplicates, 1 unreadable, 1 smaller than 96 pixels"
    assert [p.sha256 for p in found] == sorted(p.sha256 for p in found)


def test_scan_reads_only_what_changed(photos, tmp_path, monkeypatch):
    first, _ = scan([photos], 96, tmp_path / "index.json", 1)
    looked = []
    monkeypatch.setattr("photos.inspect", lambda p: looked.append(p.name))
    again, _ = scan([photos], 96, tmp_path / "index.json", 1)
    assert again == first and looked == ["broken.jpg"]


@pytest.mark.parametrize("folder, crop", [("missing", 96), ("empty", 96), ("photos", 4096)])
def test_scan_without_photos_is_an_error(folder, crop, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    path = photos if folder == "photos" else tmp_path / folder
    with pytest.raises(SystemExit, match=f"error: --data .*{path.name}"):
        scan([path], crop, tmp_path / "index.json", 1)


def stream(photos, tmp_path, **options):
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    return Pairs(found, [""] * len(found), 96, (8, 3, 3), (70, 650), 5, **options)


def test_every_epoch_takes_each_photo_once_in_another_order(photos, tmp_path):
    data = stream(photos, tmp_path)
    epochs = [[data.place(n)[1] for n in range(5 * e, 5 * e + 5)] for e in range(4)]
    assert all(sorted(e) == list(range(5)) for e in epochs) and len({tuple(e) for e in epochs}) > 1


def test_samples_do_not_depend_on_workers_or_on_each_other(photos, tmp_path):
    data = stream(photos, tmp_path)
    loaders = [torch.utils.data.DataLoader(data, batch_sampler=iter([[7, 3], [12, 0]]), num_workers=w) for w in (0, 2)]
    a, b = (list(loader) for loader in loaders)
    alone = data[12]
    for k in ("x_L", "x_H", "t", "noise"):
        assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True))
        assert torch.equal(a[1][k][0], torch.as_tensor(alone[k]))
    assert a[0]["x_L"].shape == (2, 3, 96, 96) and a[0]["noise"].shape == (2, 8, 3, 3)
    assert not torch.equal(data[2]["x_H"], data[12]["x_H"]), "another epoch, another crop"


def test_crops_flips_and_t_cover_their_ranges(photos, tmp_path):
    data = stream(photos, tmp_path)
    ends = Pairs(data.photos, [""] * 5, 96, (8, 3, 3), (70, 71), 5)
    assert {float(ends[n]["t"]) for n in range(24)} == {70, 71}, "both ends belong to the range"
    drawn = [data[n]["t"] for n in range(60)]
    assert all(70 <= v <= 650 and v == int(v) for v in drawn) and len(set(drawn)) > 40
    photo = next(p for p in data.photos if p.path.endswith("a.png"))
    i, picture = data.photos.index(photo), degrade.to_tensor(Image.open(photo.path)) * 2 - 1
    crops = [data[n]["x_H"] for n in range(200) if data.place(n)[1] == i]
    upright = [sum(torch.equal(x, picture[:, y:y + 96, x0:x0 + 96]) for y in range(0, 17, 4) for x0 in range(0, 33, 4))
               for x in crops]
    mirrored = [sum(torch.equal(x.flip(-1), picture[:, y:y + 96, x0:x0 + 96])
                    for y in range(0, 17, 4) for x0 in range(0, 33, 4)) for x in crops]
    assert all(u + m >= 1 for u, m in zip(upright, mirrored, strict=True)) and sum(upright) and sum(mirrored)


def test_the_mild_share_reaches_training_and_validation_pairs(photos, tmp_path):
    data, other = stream(photos, tmp_path, mild=1.0), stream(photos, tmp_path)
    assert torch.equal(data[3]["x_H"], other[3]["x_H"]) and not torch.equal(data[3]["x_L"], other[3]["x_L"])
    assert (data[3]["x_L"] - data[3]["x_H"]).square().mean() < (other[3]["x_L"] - data[3]["x_H"]).square().mean()
    (_, lr, hr), = validation_pairs(data.photos[:1], {}, 96, 5, None, mild=1.0)
    want = degrade.degrade(degrade.to_tensor(hr), (5, 2 ** 32 - 1, 0), mild=1.0)
    assert torch.equal(degrade.to_tensor(lr), want)


def test_real_pairs_are_cut_together(photos, tmp_path):
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    photo = next(p for p in found if p.path.endswith("a.png"))
    with Image.open(photo.path) as image:
        (tmp_path / "lq").mkdir()
        image.resize((32, 28), Image.BOX).save(tmp_path / "lq" / "a_LR4.png")
    lq = match_lq(found, tmp_path / "lq")
    assert lq == {photo.path: str(tmp_path / "lq" / "a_LR4.png")}
    data = stream(photos, tmp_path, lq=lq)
    n = next(n for n in range(5) if data.photos[data.place(n)[1]] == photo)
    sample = data[n]
    small = torch.nn.functional.avg_pool2d(sample["x_L"], 4) - torch.nn.functional.avg_pool2d(sample["x_H"], 4)
    assert small.abs().mean() < 0.03, "no blur, noise or shift: the real LR picture was used"
    Image.new("RGB", (33, 28)).save(tmp_path / "lq" / "a_LR4.png")
    with pytest.raises(SystemExit, match="33x28"):
        match_lq(found, tmp_path / "lq")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (28, 32)).save(tmp_path / "lq" / "a_LR4.png", exif=turned)
    assert match_lq(found, tmp_path / "lq") == lq, "32x28 once it is upright"
    Image.new("RGB", (32, 28)).save(tmp_path / "lq" / "a.png")
    with pytest.raises(SystemExit, match="a.png and .*a_LR4.png have the same name"):
        match_lq(found, tmp_path / "lq")
    (tmp_path / "lq" / "a.png").unlink()
    with pytest.raises(SystemExit, match="have the same name"):
        match_lq([*found, photo._replace(path="elsewhere/a.png")], tmp_path / "lq")
    (tmp_path / "lq" / "a_LR4.png").rename(tmp_path / "lq" / "unknown.png")
    with pytest.raises(SystemExit, match="no picture there"):
        match_lq(found, tmp_path / "lq")


def test_validation_pictures_are_those_of_this_run(photos, tmp_path):
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    for n in (3, 2):
        validation_pairs(found[:n], {}, 96, 5, tmp_path / "val")
        assert [len(list((tmp_path / "val" / kind).iterdir())) for kind in ("lr", "hr")] == [n, n]


def test_tags_of_a_file(photos, tmp_path, capsys):
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    table = tmp_path / "tags.csv"
    table.write_text('image,tags\na.png,"tree, blurry, road"\nb.webp,cat\n')
    tags = photo_tags(str(table), "hq", found, {}, None)
    tags = dict(zip((Path(p.path).name for p in found), tags, strict=True))
    assert tags == {"a.png": ["tree", "road"], "b.webp": ["cat"], "c.jpg": [], "d.png": [], "e.PNG": []}
    assert "3 of 5" in capsys.readouterr().out
    table.write_text("name,words\n")
    with pytest.raises(SystemExit, match="image and tags"):
        photo_tags(str(table), "hq", found, {}, None)


@pytest.mark.parametrize("protocol", ["hq", "lq"])
def test_tags_by_a_tagger_are_made_once(protocol, photos, tmp_path, monkeypatch):
    seen = []

    class Fake:
        @classmethod
        def from_pretrained(cls, name, device, dtype):
            return cls()

        def tags(self, image):
            seen.append(image)
            return ["size", f"{image.width}"]
    monkeypatch.setattr(tagger, "Tagger", Fake)
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    for _ in range(2):
        tags = photo_tags("ram", protocol, found, {}, tmp_path / "tags.csv")
        assert tags == [["size", f"{p.width}"] for p in found] and len(seen) == 5
    sharp = np.asarray(read(found[0].path).rgb)
    assert np.array_equal(np.asarray(seen[0]), sharp) == (protocol == "hq"), "lq tags come from the degraded picture"


def test_without_the_taggers_weights_there_are_no_tags(photos, tmp_path, monkeypatch, capsys):
    def unavailable(*_):
        raise weights.Unavailable("ram is not on this machine")
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", unavailable)
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    assert photo_tags("ram", "hq", found, {}, tmp_path / "tags.csv") is None
    assert "ram is not on this machine" in capsys.readouterr().err
    assert not (tmp_path / "tags.csv").exists(), "once the weights are there, tags are found"

    def corrupt(*_):
        raise ValueError("ram.pth: not a readable checkpoint")
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", corrupt)
    with pytest.raises(SystemExit, match="error: ram.pth"):
        photo_tags("ram", "hq", found, {}, tmp_path / "tags.csv")


# --- runs -------------------------------------------------------------------------------------------------------------

def test_a_run_leaves_what_it_promises(here, photos, tiny_model):
    (here / "tags.csv").write_text("image,tags\na.png,tree\n")
    assert train.main(["--data", str(photos), "--model", str(tiny_model), "--name", "r", "--tags", "tags.csv", "--crop",
                       "96", "--batch", "2", "--workers", "1", "--val", "2", "--steps", "3", "--every", "2", "--lpips",
                       "alex", "--rank", "4", "--lora-targets", "attn+ffn", "--suffix", "none"]) == 0
    folder = here / "runs" / "r"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000002.safetensors", "000003.safetensors"]
    assert same(folder / "adapter.safetensors", folder / "checkpoints" / "000003.safetensors")
    with safe_open(folder / "adapter.safetensors", "pt") as f:
        metadata, keys = f.metadata(), list(f.keys())
        assert f.get_tensor("transformer_blocks.0.attn1.to_q.lora_A.weight").shape == (4, 64)
    assert len(keys) == 2 * 2 * (4 + 4 + 2) and any("ff.conv_point" in k for k in keys)
    want = {"rank": "4", "alpha": "4", "lora_targets": "attn+ffn", "protocol": "hq", "timestep": "900.0", "step": "3",
            "lpips": "alex", "suffix": "none", "tags": "file", "photos": "4", "terms": "mse lpips align cons"}
    assert want.items() <= metadata.items()
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [bool(row["val_lpips"]) for row in rows] == [True, False, True, True]
    row = {k: float(rows[2][k]) for k in ("loss", *objective.LAMBDA)}
    assert math.isclose(row["loss"], sum(objective.LAMBDA[k] * row[k] for k in objective.LAMBDA), rel_tol=1e-4)
    assert Image.open(folder / "samples" / "000002.png").size == (3 * 96, 96)
    assert Image.open(folder / "curves.png").width > 900
    assert len(list((folder / "val" / "lr").iterdir())) == len(list((folder / "val" / "hr").iterdir())) == 1
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["step"] == 3 and not list(folder.rglob("*.tmp"))
    adapted = SanaSR.from_pretrained(tiny_model, adapter=folder / "adapter.safetensors")
    image = Image.open(next((folder / "val" / "lr").iterdir()))
    assert adapted.timestep == 900
    assert adapted.restore(image, suffix="none").tobytes() != \
        SanaSR.from_pretrained(tiny_model, adapter=False).restore(image, suffix="none").tobytes()


def test_ema_starts_fast_and_optimiser_is_the_papers(run):
    folder = run("r", "--steps", 2, "--every", 1)
    first, second = (load_file(folder / "checkpoints" / f"00000{i}.safetensors") for i in (1, 2))
    state = torch.load(folder / "state.pt", weights_only=True)
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-5, (0.9, 0.999), 1e-8, 1e-2)
    key = next(k for k in first if "lora_B" in k)
    i = list(first).index(key)  # safetensors sorts its keys, the state has the module's order
    names = list(lora_parameters_of(folder))
    i = names.index(key)
    master, decay = state["masters"][i], 2 / 12
    assert torch.allclose(second[key], decay * first[key] + (1 - decay) * master, atol=1e-9) and master.abs().max() > 0


def test_init_starts_from_an_adapter(here, run, capsys):
    first = run("first", "--steps", 3, "--lr", 1e-2) / "adapter.safetensors"
    second = run("second", "--steps", 1, "--init", first, "--seed", 1) / "adapter.safetensors"
    first, second = load_file(first), load_file(second)
    assert max((first[k] - second[k]).abs().max() for k in first) < 2e-4, "one step of 5e-5 from where the first ended"
    assert max(first[k].abs().max() for k in first if "lora_B" in k) > 1e-2
    (here / "no.safetensors").write_text("no adapter")
    with pytest.raises(SystemExit, match="no.safetensors: not a whole safetensors file"):
        run("third", "--init", here / "no.safetensors")


def made_adapter(path, rank, targets):
    """An adapter file for the tiny model, with random B."""
    dit = LinearDiT.from_pretrained(path.parent / "model" / "transformer")
    inject_lora(dit, rank, targets=targets)
    for i, p in enumerate(lora_parameters(dit).values()):
        p.data = 0.01 * noise(*p.shape, seed=i).float()
    save_lora(dit, path)
    return path


def trained(folder):
    with safe_open(folder / "adapter.safetensors", "pt") as f:
        return f.metadata(), {f.get_tensor(k).shape[0] for k in f.keys() if ".lora_A." in k}


def test_init_decides_rank_and_targets_and_all_say_so(here, run, tiny_model, capsys):
    (here / "model").symlink_to(tiny_model)
    both = made_adapter(here / "both.safetensors", 4, "attn+ffn")
    metadata, ranks = trained(run("as-init", "--steps", 1, "--init", both))
    assert ranks == {4} and (metadata["rank"], metadata["lora_targets"]) == ("4", "attn+ffn")
    assert "(rank 4, attn+ffn)" in capsys.readouterr().out
    attn = made_adapter(here / "attn.safetensors", 4, "attn")
    mixed = run("mixed", "--steps", 1, "--init", attn, "--rank", 16, "--lora-targets", "attn+ffn")
    metadata, ranks = trained(mixed)
    assert ranks == {4, 16} and (metadata["rank"], metadata["lora_targets"]) == ("4 16", "attn+ffn")
    assert "(rank 4 and 16, attn+ffn)" in capsys.readouterr().out
    model = SanaSR.from_pretrained(tiny_model, adapter=mixed / "adapter.safetensors", merge=False)
    assert {m.adapter_scale for m in lora_modules(model.dit).values()} == {1.0}
    assert train.main(["--name", "mixed", "--resume", "--steps", "2"]) == 0 and trained(mixed)[1] == {4, 16}
    for options, message in ((["--init", both, "--rank", 8], "--rank 8: --init .* has rank 4"),
                             (["--init", both, "--lora-targets", "attn"], "adapts the Mix-FFN too")):
        with pytest.raises(SystemExit, match=message):
            run("refused", "--steps", 1, *options)


def test_the_tags_cache_tells_taggers_and_pictures_apart(photos, tmp_path, monkeypatch):
    seen = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def tags(self, image):
            seen.append(image.size)
            return [self.name, f"tag {len(seen)}"]
    monkeypatch.setattr("tagger.open_tagger", lambda kind, device=None: Fake(kind))
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    photo = next(p for p in found if p.path.endswith("a.png"))
    lq, cache = tmp_path / "a_LR4.png", tmp_path / "tags.csv"
    Image.new("RGB", (photo.width // 4, photo.height // 4)).save(lq)
    ways = [("ram", "hq", {}), ("dape", "hq", {}), ("ram", "lq", {}), ("ram", "lq", {photo.path: str(lq)})]
    first = [photo_tags(kind, protocol, [photo], pairs, cache) for kind, protocol, pairs in ways]
    assert len({tags[0][1] for tags in first}) == 4 and first[1][0][0] == "dape"
    assert [photo_tags(kind, protocol, [photo], pairs, cache) for kind, protocol, pairs in ways] == first
    assert len(seen) == 4, "nothing was looked at twice"


# --- the hold-out rule ---

def test_one_photo_in_16_is_held_out_by_its_hash():
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(3200)]
    held = held_out(hashes)
    assert 150 < len(held) < 250
    assert held == held_out(reversed(hashes)) and held & set(hashes[:1600]) == held_out(hashes[:1600])


@pytest.mark.parametrize("count, expected", [(1, 0), (2, 1), (15, 1), (40, 2)])
def test_tiny_sets_hold_out_their_smallest_hashes(count, expected):
    for start in ("11", "00"):  # the rule would hold out none, or all
        hashes = [f"{start}{i:02x}" for i in range(count)]
        assert held_out(hashes) == set(hashes[:expected])


def test_no_stage_trains_on_what_is_held_out(photos, tmp_path):
    from lab import pretrain
    found, _ = scan([photos], 96, tmp_path / "index.json", 1)
    ours, held = split(found)
    theirs = pretrain.Photos([photos], 96)
    assert {p.path for p in held} == {str(path) for path, _ in theirs.val if path.name != "copy.png"}
    assert {p.path for p in ours} == {str(path) for path, _ in theirs.train if path.name != "copy.png"}


@pytest.mark.parametrize("val", [0, 1, 8])
def test_whatever_val_says_held_out_photos_are_not_trained_on(run, photos, monkeypatch, val):
    seen = []
    monkeypatch.setattr(train, "Pairs", lambda p, *rest, **options: seen.append(p) or Pairs(p, *rest, **options))
    folder = run("r", "--steps", 1, "--val", val)
    _, held = split(scan([photos], 96, folder / "data.json", 1)[0])
    assert not {p.sha256 for p in held} & {p.sha256 for p in seen[0]} and len(held) == 1
    assert len(list(folder.glob("val/hr/*"))) == min(val, 1)


def lora_parameters_of(folder):
    settings = torch.load(folder / "state.pt", weights_only=True)["settings"]
    model = SanaSR.from_pretrained(settings["model"], adapter=False)
    inject_lora(model.dit, settings["rank"], targets=settings["lora_targets"])
    return lora_parameters(model.dit)


def test_killed_and_resumed_equals_uninterrupted(here, run, photos, tiny_model):
    options = ["--steps", "20", "--every", "10"]
    whole = run("whole", *options)
    argv = ["--data", str(photos), "--model", str(tiny_model), *QUICK, "--name", "killed", *options]
    script = f"""
import os, signal, train
losses, count = train.losses, []
def killing(*args):
    count.append(1)
    if len(count) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*args)
train.losses = killing
train.main({argv})"""
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | ENV, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert torch.load(here / "runs" / "killed" / "state.pt", weights_only=True)["step"] == 10
    assert train.main(["--name", "killed", "--resume"]) == 0
    assert same(whole / "adapter.safetensors", here / "runs" / "killed" / "adapter.safetensors")
    steps = [row["step"] for row in train.read_log(here / "runs" / "killed" / "log.csv", 99)]
    assert steps == list(range(21)), "the log has no step twice"


def test_sigterm_saves_and_resume_goes_on(here, run, monkeypatch):
    whole = run("whole", "--steps", 5)
    losses, count = train.losses, []

    def killing(*args):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*args)
    monkeypatch.setattr(train, "losses", killing)
    folder = run("stopped", "--steps", 5, code=128 + signal.SIGTERM)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 3
    assert train.main(["--name", "stopped", "--resume"]) == 0
    assert same(whole / "adapter.safetensors", folder / "adapter.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves(here, photos, tiny_model, number):
    argv = ["--data", str(photos), "--model", str(tiny_model), *QUICK, "--name", "group", "--workers", "1",
            "--steps", "1000"]
    script = f"""
import os, train
losses, count = train.losses, []
def stopping(*args):
    count.append(1)
    if len(count) == 2:
        os.killpg(0, {int(number)})
    return losses(*args)
train.losses = stopping
raise SystemExit(train.main({argv}))"""
    stopped = subprocess.run([sys.executable, "-c", script], env=os.environ | ENV, capture_output=True,
                             start_new_session=True, timeout=120)
    assert stopped.returncode == 128 + number, stopped.stderr.decode()
    assert torch.load(here / "runs" / "group" / "state.pt", weights_only=True)["step"] == 2


def test_nan_stops_and_names_the_samples(here, run, monkeypatch):
    losses, count = train.losses, []

    def breaking(*args):
        count.append(1)
        values = losses(*args)
        return values if len(count) != 3 else values | {"mse": values["mse"] * math.nan}
    monkeypatch.setattr(train, "losses", breaking)
    with pytest.raises(SystemExit, match="error: step 3: loss nan"):
        run("r", "--steps", 5, "--every", 2)
    folder = here / "runs" / "r"
    report = json.loads((folder / "nan_rank0.json").read_text())
    assert report["step"] == 3 and Path(report["samples"][0]).is_file() and report["losses"]["mse"] == "nan"
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 2
    assert all(x.isfinite().all() for x in load_file(folder / "adapter.safetensors").values())


def test_a_full_disk_leaves_the_last_state(here, run, monkeypatch):
    save, count = torch.save, []

    def full(content, f):
        count.append(1)
        if len(count) == 2:
            f.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="state.pt cannot be written .No space left"):
        run("r", "--steps", 4, "--every", 2)
    assert torch.load(here / "runs" / "r" / "state.pt", weights_only=True)["step"] == 2
    assert not list((here / "runs").rglob("*.tmp"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_moves_the_adapter_alike(run, dtype):
    a, b = (load_file(run(name, "--steps", 2, "--dtype", name) / "adapter.safetensors") for name in ("fp32", dtype))
    assert all(x.dtype == torch.float32 for x in b.values())
    moved = [k for k in a if "lora_B" in k]
    cosine = sum((a[k] * b[k]).sum() for k in moved) / math.sqrt(
        sum(a[k].square().sum() for k in moved) * sum(b[k].square().sum() for k in moved))
    assert cosine > 0.8


def test_two_processes_equal_one_with_twice_the_batch(here, run, photos, tiny_model):
    # AdamW magnifies a gradient's rounding where the gradient is near its eps: with this seed there is no such weight
    one = run("one", "--steps", 3, "--batch", 2, "--seed", 2)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(ROOT / "train.py"), "--data", str(photos), "--model", str(tiny_model), "--name", "two", *QUICK,
                    "--steps", "3", "--seed", "2"], check=True, env=os.environ | ENV, capture_output=True)
    a, b = (load_file(p / "adapter.safetensors") for p in (one, here / "runs" / "two"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-6 < max(a[k].abs().max() for k in a if "lora_B" in k)


def test_switches_take_losses_away(run):
    folder = run("r", "--steps", 1, "--no-align", "--no-cons", "--timestep", 999, "--protocol", "lq")
    with safe_open(folder / "adapter.safetensors", "pt") as f:
        metadata = f.metadata()
    assert (metadata["terms"], metadata["timestep"], metadata["lpips"]) == ("mse", "999.0", "none")


def test_resume_refuses_what_changed(here, run, photos):
    folder = run("r", "--steps", 1)
    before = (folder / "state.pt").read_bytes()
    for options, message in ((["--rank", "8"], r"--rank 8 \(was 64\)"), (["--protocol", "lq"], "--protocol lq"),
                             (["--batch", "2"], "--batch times"), (["--data", str(photos / "deep")], "--data")):
        with pytest.raises(SystemExit, match=message):
            train.main(["--name", "r", "--resume", *options])
    save_photo(photos / "new.png", 128, 128, 77)
    try:
        with pytest.raises(SystemExit, match="the photos changed"):
            train.main(["--name", "r", "--resume"])
    finally:
        (photos / "new.png").unlink()
    assert (folder / "state.pt").read_bytes() == before
    assert train.main(["--name", "r", "--resume", "--steps", "2"]) == 0


def test_resume_refuses_other_tags_and_another_prior(here, photos, tiny_model):
    model, table = here / "model", here / "tags.csv"
    shutil.copytree(tiny_model, model)
    lines = "image,tags\n" + "".join(f"{p.name},tree\n" for p in photos.rglob("*.*"))
    table.write_text(lines)
    options = ["--data", str(photos), "--model", str(model), "--name", "r", *QUICK, "--tags", str(table)]
    assert train.main([*options, "--steps", "1"]) == 0
    again = ["--name", "r", "--resume", "--steps", "2"]
    table.write_text(lines.replace("tree", "cat"))
    with pytest.raises(SystemExit, match="the tags changed"):
        train.main(again)
    table.write_text(lines)
    weights_file = next((model / "transformer").glob("*.safetensors"))
    state = load_file(weights_file)
    state["proj_out.weight"] += 1
    save_file(state, weights_file)
    with pytest.raises(SystemExit, match="the model changed"):
        train.main(again)


def test_resumed_by_its_own_line_where_something_was_not_to_be_had(run, here, photos, tiny_model, monkeypatch):
    def unavailable(*_):
        raise weights.Unavailable("not on this machine")
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", unavailable)
    line = ["--data", str(photos), "--model", str(tiny_model), "--name", "r", *QUICK, "--tags", "ram"]
    assert train.main([*line, "--steps", "1"]) == 0
    assert train.main([*line, "--steps", "2", "--resume"]) == 0
    with pytest.raises(SystemExit, match=r"--tags dape \(was none\)"):
        train.main([*line, "--tags", "dape", "--resume"])


@pytest.mark.parametrize("options, message", [
    (["--name", "r"], "holds a run"), (["--name", "other", "--resume"], "nothing to resume"),
    (["--name", "n", "--model", "no-such"], "no-such"), (["--name", "n", "--crop", "100"], "multiple of 32"),
    (["--name", "n", "--crop", "64"], "at least 80"), (["--name", "n", "--tags", "no.csv"], "no.csv")])
def test_bad_settings_are_one_line(run, photos, tiny_model, options, message):
    run("r", "--steps", 1)
    argv = options if "--resume" in options else ["--data", str(photos), "--model", str(tiny_model), *QUICK, *options]
    with pytest.raises(SystemExit, match=message) as error:
        train.main(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_vanishes_is_one_line(here, photos, tiny_model, monkeypatch, workers):
    def gone(path):
        raise OSError(errno.ENOENT, "No such file or directory")
    monkeypatch.setattr(train, "scan", lambda *a: [scan(*a), monkeypatch.setattr("photos.read", gone)][0])
    argv = ["--data", str(photos), "--model", str(tiny_model), "--name", "r", *QUICK, "--workers", str(workers)]
    with pytest.raises(SystemExit, match=r"^error: /.*can no longer be read: No such file") as error:
        train.main(argv)
    assert "\n" not in str(error.value)


def test_a_damaged_state_is_one_line(run):
    folder = run("r", "--steps", 1)
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit, match="state.pt cannot be read"):
        train.main(["--name", "r", "--resume"])


def test_knee_stops_the_run(here, run, monkeypatch):
    values = iter([10, 6, 3, 1, 0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(train, "validate", lambda *a: (next(values), 20.0, Image.new("RGB", (3, 3))))
    folder = run("r", "--steps", 8, "--every", 1, "--val", 1, "--knee", 3)
    assert sorted(p.stem for p in (folder / "checkpoints").iterdir())[-1] == "000006"
    assert same(folder / "knee.safetensors", folder / "checkpoints" / "000003.safetensors")


def test_select_ranks_by_the_scores_of_the_evaluator(here, run, monkeypatch):
    folder = run("r", "--steps", 3, "--every", 1, "--val", 1)
    scores = {"000001": 0.3, "000002": 0.1, "000003": 0.2}
    real = train.evaluate, train.load_model

    def load_model(name, device, dtype, adapter, fast):
        return adapter.stem

    def evaluate(stem, pairs, names, **settings):
        assert len(pairs) == 1 and pairs[0].lr.is_file() and pairs[0].hr.is_file()
        return [{"image": "x.png", names[0]: scores[stem]}]
    monkeypatch.setattr(train, "load_model", load_model)
    monkeypatch.setattr(train, "evaluate", evaluate)
    for metric, best in (("lpips", "000002"), ("musiq", "000001")):
        assert train.main(["--name", "r", "--select", metric]) == 0
        assert same(folder / "best.safetensors", folder / "checkpoints" / f"{best}.safetensors")
    assert (folder / "select.csv").read_text().splitlines()[1] == "000001.safetensors,0.3"
    monkeypatch.setattr(train, "evaluate", real[0])
    monkeypatch.setattr(train, "load_model", real[1])
    assert train.main(["--name", "r", "--select", "psnr", "--device", "cpu"]) == 0  # and by the real ones
    checkpoint, psnr = (folder / "select.csv").read_text().splitlines()[1].split(",")
    model = SanaSR.from_pretrained(torch.load(folder / "state.pt", weights_only=True)["settings"]["model"],
                                   adapter=folder / "checkpoints" / checkpoint)
    lr, hr = (Image.open(next((folder / "val" / kind).iterdir())) for kind in ("lr", "hr"))
    x, y = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in (model.restore(lr), hr))
    assert float(psnr) == pytest.approx(metrics.load("psnr")(x, y).item(), abs=0.05)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(SystemExit, match="checkpoints is empty"):
        train.main(["--name", "r", "--select", "psnr", "--device", "cpu"])


def test_workers_never_exceed_the_cores(photos):
    args, _ = train.parse(["--data", str(photos), "--name", "nobody", "--workers", "999"])
    assert args.workers == len(os.sched_getaffinity(0))


# --- official size ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_one_step_at_official_size(capsys):
    """Batch 1, 512 crop, checkpointing, seeded weights: within 20 GB. Prints CPU seconds by part and the peak."""
    parts, models = {}, {}
    for part, cls in (("vae", DCAE), ("transformer", LinearDiT)):
        with torch.device("meta"):
            models[part] = cls(json.loads((ROOT / "tests/data/official_configs" / f"{part}.config.json").read_text()))
        manifest = [(k, v.shape) for k, v in models[part].state_dict().items()]
        models[part].load_state_dict(seeded_state_dict(manifest), assign=True)
        models[part].requires_grad_(False)
    dit, vae = models["transformer"], objective.Latents(models["vae"], 0.41407)
    torch.manual_seed(0)
    inject_lora(dit, 64)
    dit.checkpointing = models["vae"].decoder.checkpointing = True
    parameters = list(lora_parameters(dit).values())
    optimizer = torch.optim.AdamW(parameters, 5e-5)
    before = [p.detach().clone() for p in parameters]

    def timed(name, call):
        def wrapper(*args):
            start = time.process_time()
            result = call(*args)
            parts[name] = parts.get(name, 0) + time.process_time() - start
            return result
        return wrapper
    vae.encode, vae.decode = timed("encode twice", vae.encode), timed("decode", vae.decode)
    batch = {"x_L": noise(1, 3, 512, 512).float().tanh(), "x_H": noise(1, 3, 512, 512, seed=1).float().tanh(),
             "c": noise(1, 300, 2304, seed=2).float(), "m": torch.ones(1, 300), "t": torch.tensor([300.0]),
             "noise": noise(1, 32, 16, 16, seed=3).float()}
    f, f0 = timed("f twice", objective.in_float32(dit)), timed("f0 twice", objective.prior(dit))
    lpips = timed("LPIPS (AlexNet)", metrics.LPIPS.from_pretrained("alex"))
    values = objective.losses(f, f0, vae, batch, 900.0, lpips)
    timed("backward", sum(objective.LAMBDA[k] * v for k, v in values.items()).backward)()
    timed("AdamW", optimizer.step)()
    moved = max((p - b).abs().max().item() for p, b in zip(parameters, before, strict=True))
    peak = peak_memory(torch.device("cpu"))
    with capsys.disabled():
        print(f"\n{sum(p.numel() for p in parameters) / 1e6:.1f} M trained; peak {peak:.2f} GB; CPU seconds: "
              + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + f"; sum {sum(parts.values()):.0f}")
    assert all(v.isfinite() for v in values.values()) and 0 < moved < 1e-3 and peak < 20
