"""Pruning: the merge, F and the scores against other formulations, the choice, the folder, and interrupted runs."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from seeded import seeded_state_dict

import metrics
import prune
import train
from objective import Latents, in_float32, losses
from sanasr import DCAE, LinearDiT, SanaSR, inject_lora, lora_parameters, one_step, save_lora, save_module

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--tags", "none", "--lpips", "alex", "--crop", "96", "--workers", "0", "--device", "cpu"]
BLOCKS = 5


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        rgb = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(rgb).resize((128 + 8 * i, 112), Image.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def deep(tiny_model, tmp_path_factory):
    """The tiny model with five blocks, and a trained-looking adapter for τ 999 beside it."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny_model, folder)
    config = tiny.CONFIGS["transformer"][1] | {"num_layers": BLOCKS}
    with torch.device("meta"):
        dit = LinearDiT(config)
    manifest = [(key, x.shape) for key, x in dit.state_dict().items()]
    dit.load_state_dict(seeded_state_dict(manifest, ""), assign=True)
    save_module(dit, folder / "transformer")
    inject_lora(dit, rank=4, targets="attn+ffn")
    generator = torch.Generator().manual_seed(0)
    for p in lora_parameters(dit).values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    save_lora(dit, folder / "adapter.safetensors", {"timestep": "999.0", "protocol": "lq", "suffix": "main"})
    return folder


@pytest.fixture
def run(tmp_path, photos, deep):
    """run(name, options…) prunes the five-block model in this process and returns the folder written."""
    def start(name, *options, steps=3):
        out = tmp_path / name
        argv = ["--data", photos, "--model", deep, "--out", out, "--steps", steps, *QUICK, *options]
        assert prune.main([str(a) for a in argv]) == 0
        return out
    return start


def arguments(photos, deep, out, *options):
    argv = ["--data", photos, "--model", deep, "--out", out, "--steps", 2, *QUICK, *options]
    args = prune.parse([str(a) for a in argv])
    args.protocol, args.suffix = "hq", "appendix"
    out.mkdir()
    model, prior = prune.load_networks(args)
    prune.fill_defaults(args, model)
    return args, model, prior


# --- merge, F, scores -------------------------------------------------------------------------------------------------

def test_merged_network_answers_as_the_adapted_one(deep):
    apart, merged = (SanaSR.from_pretrained(deep, merge=merge) for merge in (False, True))
    base = SanaSR.from_pretrained(deep, adapter=False)
    generator = torch.Generator().manual_seed(1)
    z, c = torch.randn(2, 8, 3, 4, generator=generator), torch.randn(2, 5, 32, generator=generator)
    t, m = torch.tensor([999.0, 20.0]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        a, b, f0 = (one_step(x.dit, z, t, c, m) for x in (apart, merged, base))
    assert not lora_parameters(merged.dit)
    assert torch.linalg.norm(a - b) / torch.linalg.norm(a) < 2e-6 < 1e-3 < torch.linalg.norm(a - f0)


def test_omega():
    assert prune.omega(0) == 1 and abs(prune.omega(1000)) < 1e-12
    assert prune.omega(100) == pytest.approx(1 - 4.615121 / 6.908755, abs=1e-6)  # ln 101, ln 1001


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fisher_is_the_weighted_mean_of_squared_gradients(photos, deep, tmp_path, checkpointing):
    args, model, prior = arguments(photos, deep, tmp_path / "out", *["--checkpointing"] * checkpointing)
    calibration = prune.Calibration(args, model, prior)
    settings = dict.fromkeys(prune.FISHER_SETTINGS, "x")
    fisher = prune.measure_fisher(args, model, calibration, settings)
    dit = LinearDiT.from_pretrained(deep / "transformer")
    dit.load_state_dict(model.dit.state_dict())
    dit.requires_grad_(True)
    want = {key: torch.zeros_like(p) for key, p in dit.transformer_blocks.named_parameters()}
    for n in range(2):
        sample = {k: torch.as_tensor(v)[None] for k, v in calibration.pairs[n].items() if k not in ("prompt", "name")}
        sample["c"], sample["m"] = calibration.conditions([calibration.pairs[n]["prompt"]])
        values = losses(in_float32(dit), in_float32(prior), calibration.vae, sample, 900.0, calibration.lpips)
        w = 1 - np.log(sample["t"].item() + 1) / np.log(1001)
        loss = w * (values["mse"] + 2 * values["lpips"] + values["align"])  # no consistency term
        gradients = torch.autograd.grad(loss, list(dit.transformer_blocks.parameters()))
        for total, g in zip(want.values(), gradients, strict=True):
            total += w * g**2 / 2
    assert fisher.keys() == want.keys()
    for key in want:
        assert torch.allclose(fisher[key], want[key], rtol=1e-3, atol=1e-6 * want[key].max().item()), key
    assert not any(p.grad is not None for p in model.dit.parameters())  # freed at once
    assert not any(p.grad is not None for p in prior.parameters())


def test_scores_by_the_letter(deep):
    dit = LinearDiT.from_pretrained(deep / "transformer")
    generator = torch.Generator().manual_seed(2)
    fisher = {k: torch.rand(p.shape, generator=generator) for k, p in dit.transformer_blocks.named_parameters()}
    w = [torch.cat([p.flatten() for p in block.parameters()]).double() for block in dit.transformer_blocks]
    f = [torch.cat([fisher[f"{i}.{k}"].flatten() for k, _ in block.named_parameters()]).double()
         for i, block in enumerate(dit.transformer_blocks)]
    want = {"paper": [(a**2 / (b + 0.01)).sum().item() for a, b in zip(w, f, strict=True)],
            "obd": [(b * a**2).sum().item() / 2 for a, b in zip(w, f, strict=True)],
            "magnitude": [(a**2).sum().item() for a in w]}
    for kind, scores in want.items():
        assert prune.block_scores(dit, kind, fisher, 0.01) == pytest.approx(scores, rel=1e-5)
    assert np.argsort(prune.block_scores(dit, "tail")).tolist() == [4, 3, 2, 1, 0]
    rolls = [prune.block_scores(dit, "random", seed=s) for s in (0, 0, 1)]
    assert rolls[0] == rolls[1] != rolls[2] and sorted(rolls[0]) == [0, 1, 2, 3, 4]


# --- the choice -------------------------------------------------------------------------------------------------------

def test_first_and_last_are_kept_whatever_they_score():
    assert prune.choose([0, 5, 9, 7, 8, 0], [10] * 6, 3, 43) == [0, 2, 4, 5]
    assert prune.choose([0, 5, 9, 7, 8, 0], [10] * 6, 3, 42.9) == [0, 2, 5]
    assert prune.choose([1.0] * 6, [10] * 6, 3, 43) == [0, 1, 2, 5]  # of equals the earlier
    assert prune.choose([1.0] * 6, [10] * 6, 3, 23) == [0, 5]


def test_impossible_budgets():
    with pytest.raises(ValueError, match="takes 23 at least"):
        prune.choose([1.0] * 6, [10] * 6, 3, 22)
    with pytest.raises(ValueError, match="nothing to drop"):
        prune.choose([1.0] * 6, [10] * 6, 3, 63)
    with pytest.raises(AssertionError, match="different sizes"):
        prune.choose([1.0] * 3, [10, 11, 10], 3, 30)


def test_official_size_keeps_16_blocks_of_343_99_million():
    config = json.loads((ROOT / "tests/data/official_configs/transformer.config.json").read_text())
    with torch.device("meta"):
        dit = LinearDiT(config)
    blocks, fixed = prune.sizes(dit)
    kept = prune.choose([float(i) for i in range(28)], blocks, fixed, 0.35e9)
    small = prune.with_blocks(dit, kept)
    assert kept == [0, *range(13, 28)] and small.config["num_layers"] == 16
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 2) == 343.99


@pytest.mark.parametrize("checkpointing, limit", [(False, 16e9), (True, 8e9)])
def test_memory_of_a_calibration_step_of_official_size(checkpointing, limit):
    """In bf16 with F in float32 and VGG16's LPIPS, by counting on the meta device, where nothing is computed: weights,
    F, a block's gradients and what autograd stores for the backward pass. The operators' scratch space is extra, and so
    is, with checkpointing, the part that is recomputed."""
    configs = [json.loads((ROOT / f"tests/data/official_configs/{part}.config.json").read_text())
               for part in ("transformer", "vae")]
    with torch.device("meta"):
        dit, prior = (LinearDiT(configs[0]).bfloat16().requires_grad_(False) for _ in range(2))
        vae, lpips = DCAE(configs[1]).bfloat16().requires_grad_(False), metrics.LPIPS("vgg").requires_grad_(False)
        batch = {"x_L": torch.zeros(1, 3, 512, 512), "x_H": torch.zeros(1, 3, 512, 512), "t": torch.zeros(1),
                 "c": torch.zeros(1, 300, 2304), "m": torch.zeros(1, 300), "noise": torch.zeros(1, 32, 16, 16)}
    dit.checkpointing = prior.checkpointing = vae.decoder.checkpointing = checkpointing
    fisher = prune.Fisher(dit)
    held = [*dit.parameters(), *prior.parameters(), *vae.parameters(), *lpips.parameters(), *fisher.sums.values(),
            *dit.transformer_blocks[0].state_dict().values()]  # the last ones stand for the gradients
    total = sum(x.numel() * x.element_size() for x in held)
    stored = {}
    known = {x.untyped_storage()._cdata for x in held}

    def note(x):
        if x.untyped_storage()._cdata not in known:
            stored[x.untyped_storage()._cdata] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses(in_float32(dit), in_float32(prior), Latents(vae, 0.41407), batch, 900.0, lpips, prune.TERMS)
    activations = sum(s.nbytes() for s in stored.values())
    print(f"{total / 1e9:.2f} + {activations / 1e9:.2f} GB")
    assert 5e9 < total and 2e8 < activations and total + activations < limit


# --- the folder -------------------------------------------------------------------------------------------------------

def test_pruned_folder_is_a_model_like_any_other(run, deep, photos):
    out = run("pruned", "--keep", 3)
    config = json.loads((out / "transformer/config.json").read_text())
    notes = config["_provenance"]
    kept = notes["kept"]
    assert config["num_layers"] == len(kept) == 3 and kept[0] == 0 and kept[-1] == BLOCKS - 1
    assert (notes["timestep"], notes["protocol"], notes["suffix"]) == (999.0, "lq", "main")  # the adapter's
    assert len(notes["scores"]) == BLOCKS and notes["saliency"] == "paper" and notes["steps"] == 3
    want, got = SanaSR.from_pretrained(deep), SanaSR.from_pretrained(out)
    assert got.timestep == 999 and not (out / "adapter.safetensors").exists()
    for new, old in enumerate(kept):
        for key, p in got.dit.transformer_blocks[new].state_dict().items():
            assert torch.equal(p, want.dit.transformer_blocks[old].state_dict()[key])
    assert torch.equal(got.dit.proj_out.weight, want.dit.proj_out.weight)
    assert got.restore(Image.open(photos / "0.png").resize((16, 12))).size == (64, 48)
    with open(out / "saliency.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["block"]) for r in rows if r["kept"] == "1"] == kept
    assert [float(r["score"]) for r in rows] == pytest.approx(notes["scores"], rel=1e-5)
    inner = sorted(range(1, BLOCKS - 1), key=lambda i: -notes["scores"][i])
    assert inner[0] in kept and sorted(int(r["rank"]) for r in rows) == [1, 2, 3, 4, 5]
    picture = np.asarray(Image.open(out / "saliency.png").convert("RGB"))
    assert (picture == [0x10, 0x40, 0xc0]).all(2).any() and (picture == [0xc0] * 3).all(2).any()
    assert not list(out.rglob("*.tmp"))


def test_training_goes_on_from_a_pruned_folder(run, photos, tmp_path, monkeypatch):
    out = run("pruned", "--keep", 3, "--saliency", "magnitude")
    monkeypatch.chdir(tmp_path)
    argv = ["--data", photos, "--model", out, "--name", "heal", "--steps", 1, "--tags", "none", "--no-lpips",
            "--crop", 96, "--batch", 1, "--workers", 0, "--val", 0]
    assert train.main([str(a) for a in argv]) == 0
    assert SanaSR.from_pretrained(out, adapter=tmp_path / "runs/heal/adapter.safetensors").timestep == 900


def test_the_default_keeps_as_large_a_part_of_a_small_model_as_of_the_official_one(deep, run):
    notes = json.loads((run("pruned", "--saliency", "tail") / "transformer/config.json").read_text())["_provenance"]
    assert notes["kept"] == [0, 1, 4]  # round(5 · 16/28)


# --- the comparison ---------------------------------------------------------------------------------------------------

def test_rank_correlation():
    assert prune.rank_correlation([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert prune.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert prune.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_leaves_the_largest_weights_and_exactly_as_many(deep, dtype):
    dit = LinearDiT.from_pretrained(deep / "transformer", dtype)
    before = {k: p.clone() for k, p in dit.named_parameters()}
    zeros = sum(int((p == 0).sum()) for p in dit.parameters())
    blocks, fixed = prune.sizes(dit)
    left = fixed + 3 * blocks[0]
    network = prune.masked(dit, left)
    dropped = sum(int((p == 0).sum()) for p in network.parameters())
    assert dropped == fixed + 5 * blocks[0] - left and zeros == 0
    assert all(torch.equal(before[k], p) for k, p in dit.named_parameters())  # the original is unharmed
    pairs = [(before[k].flatten(), p.flatten()) for k, p in network.named_parameters() if "transformer_blocks" in k]
    a, b = (torch.cat(x).abs() for x in zip(*pairs, strict=True))
    assert a[b == 0].max() <= a[b != 0].min() and torch.equal(a[b != 0], b[b != 0])


def test_comparison_with_the_oracle(run, deep, photos, tmp_path, capsys):
    out = run("pruned", "--keep", 3, "--compare", "--samples", 2)
    with open(out / "compare.csv", newline="") as f:
        rows = {row["score"]: row for row in csv.DictReader(f)}
    with open(out / "oracle.csv", newline="") as f:
        oracle = list(csv.DictReader(f))
    assert len(oracle) == BLOCKS and len(rows) == 1 + 1 + len(prune.SALIENCIES) + 11 + 1
    assert float(rows["oracle"]["correlation"]) == pytest.approx(1)
    best = max((1, 2, 3), key=lambda i: float(oracle[i]["loss_increase"]))
    assert rows["oracle"]["kept"] == f"0 {best} 4" and rows["tail"]["kept"] == "0 1 4"
    notes = json.loads((out / "transformer/config.json").read_text())["_provenance"]
    assert rows["paper"]["kept"] == rows["paper, eps_p 1e-8"]["kept"] == " ".join(map(str, notes["kept"]))
    # the same by another way: the folder that was written, through train's losses
    args, _, prior = arguments(photos, deep, tmp_path / "again", "--protocol", "lq", "--suffix", "main")
    args.protocol, args.suffix, args.timestep = "lq", "main", 999.0
    calibration = prune.Calibration(args, SanaSR.from_pretrained(deep), prior)
    pruned = in_float32(LinearDiT.from_pretrained(out / "transformer"))
    total = 0.0
    for n in (3, 4):  # after the three of the calibration
        sample = {k: torch.as_tensor(v)[None] for k, v in calibration.pairs[n].items() if k not in ("prompt", "name")}
        sample["c"], sample["m"] = calibration.conditions([calibration.pairs[n]["prompt"]])
        with torch.no_grad():
            values = losses(pruned, in_float32(prior), calibration.vae, sample, 999.0, calibration.lpips)
        loss = values["mse"] + 2 * values["lpips"] + values["align"]
        total += (1 - np.log(sample["t"].item() + 1) / np.log(1001)) * loss.item() / 2
    assert float(rows["paper"]["loss"]) == pytest.approx(total, rel=1e-4)
    assert "ρ(oracle)" in capsys.readouterr().out


def test_an_interrupted_comparison_gives_no_numbers(monkeypatch, tmp_path):
    class Caught:
        caught = signal.SIGINT
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)
    monkeypatch.setattr(prune, "Signals", Caught)
    calibration = SimpleNamespace(args=SimpleNamespace(out=tmp_path), samples=lambda *_: [])  # no batch came any more
    with pytest.raises(SystemExit) as ended:
        prune.mean_losses(calibration, {"all": None}, 0, 2, "oracle")
    assert ended.value.code == 128 + signal.SIGINT


# --- healing and validation -------------------------------------------------------------------------------------------

def test_relative_drop_goes_in_the_worse_direction():
    assert prune.relative_drop("psnr", 20.0, 19.0) == pytest.approx(0.05)
    assert prune.relative_drop("lpips", 0.20, 0.21) == pytest.approx(0.05)
    assert prune.relative_drop("lpips", 0.20, 0.19) == pytest.approx(-0.05)


def test_validation_says_which_metric_fails(tmp_path, photos, deep, monkeypatch, capsys):
    argv = [str(a) for a in ["--data", photos, "--model", deep, "--out", tmp_path / "out", *QUICK, "--saliency", "tail",
                             "--validate", "--metrics", "psnr,lpips"]]
    real = prune.mean_scores
    monkeypatch.setattr(prune, "mean_scores", lambda args, pairs, model, adapter=None:
                        {"psnr": 20.0, "lpips": 0.2} if model == str(deep) else {"psnr": 19.5, "lpips": 0.2061})
    assert prune.main(argv) == 1
    with open(tmp_path / "out/validation.csv", newline="") as f:
        rows = {row["metric"]: row for row in csv.DictReader(f)}
    assert (rows["psnr"]["passed"], rows["lpips"]["passed"]) == ("1", "0")  # 2.5 % and 3.05 %
    assert float(rows["psnr"]["drop"]) == pytest.approx(0.025)
    assert "pruned: failed" in capsys.readouterr().out
    monkeypatch.setattr(prune, "mean_scores", real)
    assert prune.main([*argv, "--resume"]) in (0, 1)
    with open(tmp_path / "out/validation.csv", newline="") as f:
        rows = {row["metric"]: row for row in csv.DictReader(f)}
    psnr = []  # of the unpruned model, by restoring the held-out pictures here
    model = SanaSR.from_pretrained(deep)
    for path in sorted((tmp_path / "out/val/lr").iterdir()):
        x, y = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in (
            model.restore(Image.open(path), "", suffix="main"), Image.open(tmp_path / "out/val/hr" / path.name)))
        psnr.append(metrics.load("psnr")(x, y).item())
    assert len(psnr) == 1 and float(rows["psnr"]["unpruned"]) == pytest.approx(psnr[0], rel=1e-4)
    assert float(rows["psnr"]["value"]) != pytest.approx(psnr[0], rel=1e-6)


def test_healing_trains_on_the_pruned_model_and_merges(run):
    out = run("pruned", "--keep", 3, "--saliency", "magnitude", "--heal", 2)
    healed, pruned = (SanaSR.from_pretrained(folder) for folder in (out / "healed", out))
    run_folder, = out.glob("heal-*")
    want = SanaSR.from_pretrained(out, adapter=run_folder / "adapter.safetensors").dit.state_dict()
    assert all(torch.equal(want[k], v) for k, v in healed.dit.state_dict().items())
    assert any(not torch.equal(v, want[k]) for k, v in pruned.dit.state_dict().items())
    assert healed.timestep == 999 and healed.metadata["healed_steps"] == 2 and healed.metadata["kept"][-1] == 4
    run("pruned", "--keep", 3, "--saliency", "magnitude", "--heal", 3, "--resume")  # goes on with the same run
    assert SanaSR.from_pretrained(out / "healed").metadata["healed_steps"] == 3
    assert len(list(out.glob("heal-*"))) == 1


# --- interrupted runs -------------------------------------------------------------------------------------------------

def weights_of(out):
    return load_file(out / "transformer/diffusion_pytorch_model.safetensors")


def test_a_resumed_calibration_is_that_which_was_not_interrupted(run):
    whole = torch.load(run("whole", "--keep", 3, steps=4) / "calibration.pt", weights_only=True)
    out = run("parts", "--keep", 3, steps=2)
    run("parts", "--keep", 3, "--resume", steps=4)
    parts = torch.load(out / "calibration.pt", weights_only=True)
    assert whole["step"] == parts["step"] == 4
    assert all(torch.equal(whole["sums"][k], parts["sums"][k]) for k in whole["sums"])
    before = (out / "calibration.pt").stat().st_mtime_ns
    run("parts", "--keep", 2, "--saliency", "obd", "--resume", steps=4)  # another score and budget, no new sample
    assert torch.load(out / "calibration.pt", weights_only=True)["step"] == 4
    assert (out / "calibration.pt").stat().st_mtime_ns == before
    notes = json.loads((out / "transformer/config.json").read_text())["_provenance"]
    assert notes["kept"] == [0, 4] and notes["saliency"] == "obd"


def test_calibrations_on_other_tags_or_lr_pictures_are_not_mixed(run, photos, tmp_path):
    table, lq = tmp_path / "tags.csv", tmp_path / "lq"
    table.write_text("image,tags\n" + "".join(f"{i}.png,tree\n" for i in range(4)))
    lq.mkdir()
    for i in range(4):
        with Image.open(photos / f"{i}.png") as image:
            image.resize((image.width // 4, image.height // 4)).save(lq / f"{i}.png")
    run("out", "--tags", table, "--lq", lq, steps=1)
    run("out", "--tags", table, "--lq", lq, "--resume", steps=2)
    with pytest.raises(SystemExit, match="tags, prompts_sha256 changed"):
        run("out", "--tags", "none", "--lq", lq, "--resume", steps=3)
    with pytest.raises(SystemExit, match="lq_sha256 changed"):
        run("out", "--tags", table, "--resume", steps=3)
    table.write_text("image,tags\n" + "".join(f"{i}.png,cat\n" for i in range(4)))
    with pytest.raises(SystemExit, match="resume: prompts_sha256 changed"):
        run("out", "--tags", table, "--lq", lq, "--resume", steps=3)


def test_ctrl_c_saves_and_resumes(photos, deep, tmp_path):
    out = tmp_path / "out"
    argv = ["--data", photos, "--model", deep, "--out", out, "--steps", 100_000, "--keep", 3, *QUICK]
    process = subprocess.Popen([sys.executable, ROOT / "prune.py", *map(str, argv)], cwd=tmp_path,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = ""
    while not re.search(r"[1-9]\d*/100000", seen) and process.poll() is None:  # the bar: the loop runs
        seen = seen[-30:] + process.stderr.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in stdout, stderr
    assert not (out / "transformer").exists()
    done = torch.load(out / "calibration.pt", weights_only=True)["step"]
    assert 1 <= done < 100_000
    argv[argv.index(100_000)] = done + 1
    assert prune.main([*map(str, argv), "--resume"]) == 0
    assert (out / "transformer/config.json").exists()


def test_a_model_of_two_blocks_has_none_to_drop(run, tiny_model):
    with pytest.raises(SystemExit, match="has 2 blocks: first and last are kept"):
        run("pruned", "--model", tiny_model)


@pytest.mark.parametrize("options, message", [
    (["--keep", "1"], "of 5 blocks 2 to 4 can be kept"),
    (["--keep", "5"], "of 5 blocks 2 to 4 can be kept"),
    (["--budget", "10"], "does not hold the first and the last block"),
    (["--budget", "1e9"], "leaves nothing to drop"),
    (["--adapter", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--model", "nowhere"], "nowhere: neither a folder nor a known model"),
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--steps", "0"], "--steps must be positive"),
    (["--eps-p", "0"], "--eps-p must be positive"),
    (["--timestep", "1001"], "--timestep must lie in"),
])
def test_errors_are_one_line(run, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run("pruned", *options)
    assert stop.value.code not in (0, None)
    assert message in str(stop.value.code) + capsys.readouterr().err


def test_what_lies_there_is_not_overwritten(run, tmp_path, photos):
    out = run("pruned", "--keep", 3)
    before = weights_of(out)
    for options, message in ((["--keep", 2], "add --resume"), (["--resume", "--seed", 1], "seed changed"),
                             (["--resume", "--timestep", 5], "timestep changed")):
        with pytest.raises(SystemExit, match=message):
            run("pruned", *options)
    with pytest.raises(SystemExit, match="more than --steps 2"):
        run("pruned", "--resume", steps=2)
    (out / "calibration.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="delete it to calibrate anew"):
        run("pruned", "--resume")
    assert all(torch.equal(before[k], v) for k, v in weights_of(out).items())
    assert prune.parse(["--out", str(tmp_path / "x"), "--saliency", "tail"]).data is None  # needs no photos
    with pytest.raises(SystemExit):
        prune.parse(["--out", str(tmp_path / "x")])
