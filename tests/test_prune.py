"""Pruning: the merge, F and the scores against other formulations, the choice, the folder, and interrupted runs."""

import inspect
import json
import math
import signal

import numpy as np
import pytest
import tiny
import torch
from conftest import noise, on_meta, save_photo, state, table
from PIL import Image

import metrics
import prune
import train
from objective import REC_AND_ALIGN, Latents, fill_defaults, in_float32, losses
from photos.degrade import to_tensor
from photos.pairs import TrainingData
from sanasr import DCAE, LinearDiT, SanaSR
from weights.configs import DIT_DEFAULTS
from weights.files import open_weights

QUICK = ["--tags", "none", "--lpips", "alex", "--crop", "96", "--workers", "0", "--device", "cpu"]
BLOCKS = 5
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny model with five blocks, and a trained-looking adapter for τ 999 beside it."""
    config = tiny.CONFIGS["transformer"][1] | {"num_layers": BLOCKS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "transformer", (LinearDiT, config))
        folder = tiny.tiny_model(tmp_path_factory.mktemp("deep") / "model")
    about = {"timestep": "999.0", "protocol": "lq", "suffix": "main"}
    tiny.tiny_adapter(folder / "adapter.safetensors", folder, targets="attn+ffn", metadata=about)
    (folder / "provenance.json").write_text('{"training": {"losses": {"align": 0, "lattice": 30}}}')
    return folder


@pytest.fixture
def line(tmp_path, photos, deep):
    """line(name, options…): the arguments for a pruning of the five-block model into a folder of that name."""
    return lambda name, *options: [
        str(a) for a in ("--data", photos, "--model", deep, "--out", tmp_path / name, *QUICK, *options)]


@pytest.fixture
def run(tmp_path, line):
    """run(name, options…) prunes in this process and returns the folder written."""
    def start(name, *options, steps=3):
        assert prune.main(line(name, "--steps", steps, *options)) == 0
        return tmp_path / name
    return start


def calibration_of(argv):
    args = prune.parse([*argv, "--steps", "2"])
    model = SanaSR.from_pretrained(args.model)
    fill_defaults(args, model)
    args.out.mkdir()
    return args, model, prune.Calibration(args, model, TrainingData(args, args.out, args.protocol))


def l_cal(dit, prior, calibration, sample, tau):
    """(ω, L_cal) through train.py's losses."""
    known = calibration.update.keywords
    values = losses(in_float32(dit), in_float32(prior), known["vae"], sample, tau, known["lpips"])
    w = 1 - np.log(sample["t"].item() + 1) / np.log(1001)
    return w, w * (values["mse"] + 2 * values["lpips"] + values["align"])  # no consistency term


def notes_of(out):
    return json.loads((out / "transformer/config.json").read_text())["_provenance"]


def test_formulas():
    for numbers, rho in (([10, 20, 40, 80], 1), ([4, 3, 2, 1], -1), ([1, 3, 2, 4], 1 - 6 * 2 / (4 * 15))):
        assert prune.rank_correlation([1, 2, 3, 4], numbers) == pytest.approx(rho)
    for *scores, drop in (("psnr", 20, 19, 0.05), ("lpips", 0.2, 0.21, 0.05), ("lpips", 0.2, 0.19, -0.05)):
        assert prune.relative_drop(*scores) == pytest.approx(drop)  # in the worse direction


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_fisher_is_the_weighted_mean_of_squared_gradients(line, deep, checkpointing):
    args, model, calibration = calibration_of(line("out", "--checkpointing", checkpointing, "--protocol", "hq",
                                                   "--suffix", "appendix"))
    fisher = prune.calibrate(args, model.dit, calibration, {})
    dit, prior = (LinearDiT.from_pretrained(deep / "transformer") for _ in range(2))
    dit.load_state_dict(model.dit.state_dict())
    dit.requires_grad_(True)
    want = {key: torch.zeros_like(p) for key, p in dit.transformer_blocks.named_parameters()}
    for sample in calibration.samples(0, 2):
        w, loss = l_cal(dit, prior, calibration, sample, 900.0)
        gradients = torch.autograd.grad(loss, list(dit.transformer_blocks.parameters()))
        for total, g in zip(want.values(), gradients, strict=True):
            total += w * g**2 / 2
    assert fisher.keys() == want.keys()
    for key in want:
        assert torch.allclose(fisher[key], want[key], rtol=1e-3, atol=1e-6 * want[key].max().item()), key
    frozen = inspect.getclosurevars(calibration.f0).nonlocals["dit"]
    assert not any(p.grad is not None for p in [*model.dit.parameters(), *frozen.parameters()])  # freed at once


def test_scores_by_the_letter(deep):
    dit = LinearDiT.from_pretrained(deep / "transformer")
    fisher = {k: noise(*p.shape, dtype=torch.float32).abs() for k, p in dit.transformer_blocks.named_parameters()}
    w = [torch.cat([p.flatten() for p in block.parameters()]).double() for block in dit.transformer_blocks]
    f = [torch.cat([f.flatten() for k, f in fisher.items() if k.startswith(f"{i}.")]).double() for i in range(BLOCKS)]
    want = {"paper": [(a**2 / (b + 0.01)).sum().item() for a, b in zip(w, f, strict=True)],
            "obd": [(b * a**2).sum().item() / 2 for a, b in zip(w, f, strict=True)],
            "magnitude": [(a**2).sum().item() for a in w]}
    for kind, scores in want.items():
        assert prune.block_scores(dit, kind, fisher, 0.01) == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("scores, kept", [
    ([0, 5, 9, 7, 8, 0], [0, 2, 4, 5]), ([0, 5, 9, 7, 8, 0], [0, 2, 5]), ([1] * 6, [0, 1, 2, 5]), ([1] * 6, [0, 5])])
def test_first_and_last_are_kept_whatever_they_score(scores, kept):
    assert prune.choose(scores, len(kept)) == kept  # of equals the earlier


def test_budgets(deep):
    dit = LinearDiT.from_pretrained(deep / "transformer")
    size, total = (sum(p.numel() for p in x.parameters()) for x in (dit.transformer_blocks[0], dit))
    assert prune.room(dit, budget=total - 2 * size) == 3 and prune.room(dit, budget=total - 2 * size - 0.1) == 2
    for budget, holds in ((total - 3 * size - 1, 1), (10, 0), (total, 5), (math.inf, 5)):
        with pytest.raises(ValueError, match=f"{holds} of 5 blocks: .* --budget {total - 3 * size} to {total - size} "):
            prune.room(dit, budget=budget)
    dit.transformer_blocks[1] = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="different sizes"):
        prune.room(dit)


@pytest.mark.parametrize("change, all_blocks, kept, millions, in_the_papers_budget", [
    ({}, 28, 16, 343.99, 16), (DIT_DEFAULTS, 20, 11, 903.18, 3)], ids=["SANA-0.6B", "SANA-1.6B"])
def test_the_default_is_the_same_share_of_every_official_size(change, all_blocks, kept, millions, in_the_papers_budget):
    dit = on_meta(LinearDiT, "dit_sana_600m", **change)
    assert prune.room(dit) == kept and prune.room(dit, budget=0.35e9) == in_the_papers_budget
    blocks = prune.choose(range(all_blocks), kept)
    small = prune.with_blocks(dit, blocks)
    assert blocks == [0, *range(all_blocks - kept + 1, all_blocks)] and small.config["num_layers"] == kept
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("checkpointing, limit", [(False, 16e9), (True, 8e9)])
def test_memory_of_a_calibration_step_of_official_size(checkpointing, limit):
    """In bf16 with F in float32 and VGG16's LPIPS, by counting on the meta device, where nothing is computed: weights,
    F, a block's gradients and what autograd stores for the backward pass. The operators' scratch space is extra, and so
    is, with checkpointing, the part that is recomputed."""
    official = (LinearDiT, "dit_sana_600m"), (LinearDiT, "dit_sana_600m"), (DCAE, "dcae_f32c32_sana")
    dit, prior, vae = (on_meta(*part).bfloat16().requires_grad_(False) for part in official)
    with torch.device("meta"):
        lpips = metrics.LPIPS("vgg").requires_grad_(False)
        batch = {"x_L": torch.zeros(1, 3, 512, 512), "x_H": torch.zeros(1, 3, 512, 512), "t": torch.zeros(1),
                 "c": torch.zeros(1, 300, 2304), "m": torch.zeros(1, 300), "noise": torch.zeros(1, 32, 16, 16)}
    dit.checkpointing = prior.checkpointing = vae.decoder.checkpointing = checkpointing
    held = [*dit.parameters(), *prior.parameters(), *vae.parameters(), *lpips.parameters(),
            *prune.Fisher(dit).sums.values(), *dit.transformer_blocks[0].state_dict().values()]  # these: the gradients
    total = sum(x.numel() * x.element_size() for x in held)
    stored, known = {}, {x.untyped_storage()._cdata for x in held}

    def note(x):
        stored[x.untyped_storage()._cdata] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses(in_float32(dit), in_float32(prior), Latents(vae, 0.41407), batch, 900.0, lambda x, y, _: lpips(x, y),
               REC_AND_ALIGN)
    activations = sum(x.nbytes() for key, x in stored.items() if key not in known)
    print(f"{total / 1e9:.2f} + {activations / 1e9:.2f} GB")
    assert 5e9 < total and 2e8 < activations and total + activations < limit


def test_pruned_folder_is_a_model_like_any_other(run, deep):
    out = run("pruned", "--keep", 3)
    notes, kept = notes_of(out), notes_of(out)["kept"]
    assert len(kept) == 3 and kept[0] == 0 and kept[-1] == BLOCKS - 1
    assert (notes["timestep"], notes["protocol"], notes["suffix"]) == (999.0, "lq", "main")  # the adapter's
    assert len(notes["scores"]) == BLOCKS and notes["saliency"] == "paper" and notes["steps"] == 3
    want, got = SanaSR.from_pretrained(deep), SanaSR.from_pretrained(out)
    assert got.dit.config["num_layers"] == 3 and got.timestep == 999 and not (out / "adapter.safetensors").exists()
    for new, old in enumerate(kept):
        for key, p in got.dit.transformer_blocks[new].state_dict().items():
            assert torch.equal(p, want.dit.transformer_blocks[old].state_dict()[key])
    assert torch.equal(got.dit.proj_out.weight, want.dit.proj_out.weight)
    assert got.restore(Image.new("RGB", (16, 12))).size == (64, 48)
    rows = table(out / "saliency.csv").values()
    assert [int(r["block"]) for r in rows if r["kept"] == "1"] == kept
    assert [float(r["score"]) for r in rows] == pytest.approx(notes["scores"], rel=1e-5)
    inner = sorted(range(1, BLOCKS - 1), key=lambda i: -notes["scores"][i])
    assert inner[0] in kept and sorted(int(r["rank"]) for r in rows) == [1, 2, 3, 4, 5]
    picture = np.asarray(Image.open(out / "saliency.png").convert("RGB"))
    assert (picture == [0x10, 0x40, 0xc0]).all(2).any()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_leaves_the_largest_weights_and_exactly_as_many(deep, dtype):
    dit = LinearDiT.from_pretrained(deep / "transformer", dtype)
    before = {k: p.clone() for k, p in dit.named_parameters()}
    size = sum(p.numel() for p in dit.transformer_blocks[0].parameters())
    network = prune.masked(dit, sum(p.numel() for p in dit.parameters()) - 2 * size)
    assert [sum(int((p == 0).sum()) for p in x.parameters()) for x in (dit, network)] == [0, 2 * size]
    assert all(torch.equal(before[k], p) for k, p in dit.named_parameters())  # the original is unharmed
    pairs = [(before[k].flatten(), p.flatten()) for k, p in network.named_parameters() if "transformer_blocks" in k]
    a, b = (torch.cat(x).abs() for x in zip(*pairs, strict=True))
    assert a[b == 0].max() <= a[b != 0].min() and torch.equal(a[b != 0], b[b != 0])


def test_comparison_with_the_oracle(run, line, deep, capsys):
    out = run("pruned", "--keep", 3, "--compare", "--samples", 2)
    rows, oracle = table(out / "compare.csv"), [*table(out / "oracle.csv").values()]
    assert len(oracle) == BLOCKS and len(rows) == 1 + 1 + len(prune.SALIENCIES) + 1 + prune.RANDOM + 11 + 1
    assert [float(row["tail"]) for row in oracle] == [0, -1, -2, -3, -4]
    assert [int(row["random 0"]) for row in oracle] == np.random.default_rng(0).permutation(BLOCKS).tolist()
    assert float(rows["oracle"]["correlation"]) == pytest.approx(1)
    best = max((1, 2, 3), key=lambda i: float(oracle[i]["loss_increase"]))
    assert rows["oracle"]["kept"] == f"0 {best} 4" and rows["tail"]["kept"] == "0 1 4"
    assert rows["paper"]["kept"] == rows["paper, eps_p 1e-8"]["kept"] == " ".join(map(str, notes_of(out)["kept"]))
    # the same by another way: the folder that was written, through train's losses
    calibration = calibration_of(line("again", "--protocol", "lq", "--suffix", "main"))[2]
    pruned, prior = (LinearDiT.from_pretrained(folder / "transformer") for folder in (out, deep))
    with torch.no_grad():  # after the three samples of the calibration
        total = sum(l_cal(pruned, prior, calibration, x, 999.0)[1].item() / 2 for x in calibration.samples(3, 5))
    assert float(rows["paper"]["loss"]) == pytest.approx(total, rel=1e-4)
    assert "ρ(oracle)" in capsys.readouterr().out


def test_an_interrupted_comparison_gives_no_numbers(run, monkeypatch):
    out = run("pruned", "--keep", 3)
    monkeypatch.setattr(prune.Calibration, "samples", lambda self, first, last, signals=None: (
        iter(()) if first == last else signal.raise_signal(signal.SIGINT)))
    with pytest.raises(SystemExit) as ended:
        run("pruned", "--keep", 3, "--resume", "--compare")
    assert ended.value.code == 130 and not (out / "compare.csv").exists() and len(notes_of(out)["kept"]) == 3


def test_validation_says_which_metric_fails(tmp_path, line, deep, monkeypatch, capsys):
    argv = line("out", "--saliency", "magnitude", "--validate", "--metrics", "psnr,lpips")
    real = prune.mean_scores
    monkeypatch.setattr(prune, "mean_scores", lambda args, pairs, model, adapter=None:
                        {"psnr": 20.0, "lpips": 0.2} if model == str(deep) else {"psnr": 19.5, "lpips": 0.2061})
    assert prune.main(argv) == 1
    rows = table(tmp_path / "out/validation.csv", "metric")
    assert (rows["psnr"]["passed"], rows["lpips"]["passed"]) == ("1", "0")  # 2.5 % and 3.05 %
    assert float(rows["psnr"]["drop"]) == pytest.approx(0.025)
    assert "pruned: failed" in capsys.readouterr().out
    monkeypatch.setattr(prune, "mean_scores", real)
    assert prune.main([*argv, "--resume"]) in (0, 1)
    rows = table(tmp_path / "out/validation.csv", "metric")
    psnr, model = [], SanaSR.from_pretrained(deep)  # of the unpruned model, by restoring the held-out pictures here
    for path in sorted((tmp_path / "out/val/lr").iterdir()):
        x, y = (to_tensor(image)[None] for image in (
            model.restore(Image.open(path), "", suffix="main"), Image.open(tmp_path / "out/val/hr" / path.name)))
        psnr.append(metrics.load("psnr")(x, y).item())
    assert float(rows["psnr"]["unpruned"]) == pytest.approx(np.mean(psnr), rel=1e-4)
    assert float(rows["psnr"]["value"]) != pytest.approx(np.mean(psnr), rel=1e-6)


def test_healing_trains_on_the_pruned_model_and_merges(run, photos, tmp_path):
    out = run("pruned", "--saliency", "magnitude", "--heal", 2)
    healed, pruned = (SanaSR.from_pretrained(folder) for folder in (out / "healed", out))
    run_folder, = out.glob("heal-*")
    want = SanaSR.from_pretrained(out, adapter=run_folder / "adapter.safetensors").dit.state_dict()
    assert all(torch.equal(want[k], v) for k, v in healed.dit.state_dict().items())
    assert any(not torch.equal(v, want[k]) for k, v in pruned.dit.state_dict().items())
    assert healed.timestep == 999 and healed.metadata["healed_steps"] == 2
    with open_weights(run_folder / "adapter.safetensors") as file:
        assert file.metadata()["terms"] == "mse lpips cons lattice"  # the losses of the model that was pruned
    assert len(healed.metadata["kept"]) == 3 and healed.metadata["kept"][-1] == 4  # round(5 · 16/28)
    run("pruned", "--saliency", "magnitude", "--heal", 3, "--resume")  # goes on with the same run
    assert SanaSR.from_pretrained(out / "healed").metadata["healed_steps"] == 3
    assert len(list(out.glob("heal-*"))) == 1
    argv = ["--data", photos, "--model", out, *QUICK, "--name", "x", "--steps", 1, "--no-lpips", "--batch", 1]
    assert train.main([str(a) for a in argv]) == 0  # train.py by itself goes on from the pruned folder
    assert SanaSR.from_pretrained(out, adapter=tmp_path / "runs/x/adapter.safetensors").timestep == 900


def test_an_interrupted_calibration_is_resumed_as_if_it_had_not_been(run, monkeypatch, capsys, tmp_path):
    def sums(out):
        saved = state(out, "calibration.pt")
        return saved["step"], torch.cat([x.flatten() for x in saved["sums"].values()])
    step, want = sums(run("whole", "--keep", 3, steps=4))
    loss, calls, out = prune.calibration_loss, [], tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(prune, "calibration_loss", lambda update: (
            calls.append(1), len(calls) == 2 and signal.raise_signal(signal.SIGINT), loss(update))[-1])
        run("parts", "--keep", 3, steps=100)
    assert ended.value.code == 130 and "step 2 is saved, --resume goes on" in capsys.readouterr().out
    assert sums(out)[0] == 2 and not (out / "transformer").exists()
    run("parts", "--keep", 3, "--resume", steps=4)
    assert sums(out)[0] == step == 4 and torch.equal(sums(out)[1], want)
    before = (out / "calibration.pt").stat().st_mtime_ns
    run("parts", "--keep", 2, "--saliency", "obd", "--resume", steps=4)  # another score and budget, no new sample
    assert (out / "calibration.pt").stat().st_mtime_ns == before
    assert notes_of(out)["kept"] == [0, 4] and notes_of(out)["saliency"] == "obd"


def test_calibrations_on_other_tags_or_lr_pictures_are_not_mixed(run, tmp_path):
    tags, hq, lq = tmp_path / "tags.csv", tmp_path / "hq", tmp_path / "lq"
    tags.write_text("image,tags\n" + "".join(f"{i}.png,tree\n" for i in range(4)))
    for i in range(4):
        save_photo(hq / f"{i}.png", 128, 112, i)
        save_photo(lq / f"{i}.png", 32, 28, i)
    same = ["--data", hq, "--tags", tags, "--lq", lq]
    run("out", *same, steps=1)
    run("out", *same, "--resume", steps=2)
    for options, changed in (([*same, "--tags", "none"], "tags"), (same[:-2], "LR pictures"), (same, "tags")):
        if options is same:
            tags.write_text(tags.read_text().replace("tree", "cat"))
        with pytest.raises(SystemExit, match=f"settings: the {changed} changed;"):
            run("out", *options, "--resume", steps=3)


@pytest.mark.parametrize("options, message", [
    ("--keep 1", "1 of 5 blocks: the first and the last are kept"), ("--model TINY", "2 of 2 blocks"),
    ("--keep 5", "5 of 5 blocks: the first and the last are kept, and one is dropped"),
    ("--model linearsr-embedded", "is a LinearSR model"), ("--eps-p 0", "--eps-p must be above 0, not 0"),
    ("--adapter nowhere.safetensors", "nowhere.safetensors: no such file"), ("--dtype fp16", "take bf16 or fp32"),
    ("--model nowhere", "nowhere: neither a folder nor a known model"), ("--data nowhere", "nowhere: no such folder"),
    ("--saliency random", "invalid choice: 'random'")])
def test_errors_are_one_line(run, tiny_model, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run("pruned", *options.replace("TINY", str(tiny_model)).split())
    assert stop.value.code not in (0, None)
    assert message in str(stop.value.code) + capsys.readouterr().err


def test_what_lies_there_is_not_overwritten(run, tmp_path):
    out = run("pruned", "--keep", 3)
    path = out / "transformer/diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    for options, message in ((["--keep", 2], "add --resume"), (["--resume", "--seed", 1], r"--seed 1 \(was 0\)"),
                             (["--resume", "--timestep", 5], r"--timestep 5.0 \(was 999.0\)")):
        with pytest.raises(SystemExit, match=message):
            run("pruned", *options)
    with pytest.raises(SystemExit, match="more than --steps 2"):
        run("pruned", "--resume", steps=2)
    (out / "calibration.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="delete it to calibrate anew"):
        run("pruned", "--resume")
    assert path.read_bytes() == before
    assert prune.parse(["--out", str(tmp_path / "x"), "--saliency", "magnitude"]).data is None  # needs no photos
    with pytest.raises(SystemExit):
        prune.parse(["--out", str(tmp_path / "x")])
