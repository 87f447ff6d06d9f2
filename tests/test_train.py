"""Training runs: what they leave behind, and that they are resumed, killed, stopped and split without a difference."""
import errno
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from conftest import ROOT, in_a_process, noise, on_meta, python, relative, save_photo, state
from PIL import Image
from safetensors.torch import load_file, save_file
from seeded import seeded_module

import metrics
import objective
import runs
import train
import weights
from lab import profile
from photos import pairs, tagger
from photos.degrade import sharpen, to_tensor
from runs import peak_memory, read_log
from sanasr import DCAE, LinearDiT, SanaSR, inject_lora, lora_modules, lora_parameters, read_lora

QUICK = ["--tags", "none", "--steps", "3", "--no-lpips", "--crop", "96", "--batch", "1", "--workers", "0", "--val", "0"]


@pytest.fixture
def line(here, photos, tiny_model):
    """line(name, options…): the arguments of a training of the tiny model."""
    return lambda name, *options: ["--data", str(photos), "--model", str(tiny_model), "--name", name, *QUICK,
                                   *map(str, options)]


@pytest.fixture
def run(here, line):
    """run(name, options…) trains in this process and returns the run's folder."""
    def start(name, *options, code=0):
        assert train.main(line(name, *options)) == code
        return here / "runs" / name
    return start


@pytest.fixture
def on_loss(monkeypatch):
    """on_loss(n, act): act(values, batch, τ) is called at the n-th loss (None: at each) and may replace it."""
    def start(n, act):
        losses, count = objective.losses, []

        def acting(f, f0, vae, batch, tau, *rest):
            count.append(1)
            values = losses(f, f0, vae, batch, tau, *rest)
            return (act(values, batch, tau) if n in (None, len(count)) else None) or values
        monkeypatch.setattr(objective, "losses", acting)
    return start


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(folder):
    """The metadata and the ranks of a run's adapter."""
    adapter, metadata = read_lora(folder / "adapter.safetensors")
    return metadata, {len(x) for key, x in adapter.items() if ".lora_A." in key}


def trained_on(photos, folder):
    """The photos below a folder that are not held out."""
    return pairs.split(pairs.scan([photos], 96, folder / "again.json", 1)[0])[0]


def test_a_run_leaves_what_it_promises(here, line, photos, tiny_model, sana):
    (here / "tags.csv").write_text("image,tags\na.png,tree\n")
    argv = line("r", "--tags", "tags.csv", "--batch", 2, "--workers", 1, "--val", 2, "--every", 2, "--lpips", "alex",
                "--rank", 4, "--lora-targets", "attn+ffn", "--suffix", "none")
    argv.remove("--no-lpips")
    assert train.main(argv) == 0
    folder = here / "runs" / "r"
    assert [p.stem for p in sorted((folder / "checkpoints").iterdir())] == ["000000", "000002", "000003"]
    assert same(folder / "adapter.safetensors", folder / "checkpoints" / "000003.safetensors")
    metadata, ranks = trained(folder)
    keys = load_file(folder / "adapter.safetensors").keys()
    assert ranks == {4} and len(keys) == 2 * 2 * (4 + 4 + 2) and any("ff.conv_point" in k for k in keys)
    want = {"rank": "4", "alpha": "4", "lora_targets": "attn+ffn", "protocol": "hq", "timestep": "900.0", "step": "3",
            "lpips": "alex", "suffix": "none", "tags": "file", "photos": "4", "terms": "mse lpips align cons",
            "photos_sha256": pairs.digest(trained_on(photos, here))}
    assert want.items() <= metadata.items()
    assert (folder / "log.csv").read_text().splitlines()[0] == \
        "step,loss,mse,lpips,align,cons,grad_norm,val_lpips,val_psnr,val_lattice,samples_per_s,tflops,memory_gb"
    rows = read_log(folder / "log.csv")
    assert [("val_lpips" in row, "val_psnr" in row, "loss" in row) for row in rows] == [
        (True, True, False), (False, False, True), (True, True, True), (True, True, True)]
    for row in rows[1:]:
        want = sum(term.weight * row[name] for name, term in objective.TERMS.items() if term.weight)
        assert math.isclose(row["loss"], want, rel_tol=1e-4)
    encode, dit, decode = (2e-12 * stage.macs for stage in profile.count(sana, 96) if stage.name != "text")
    least = 2 * (2 * encode + 4 * dit + decode)  # of two samples, forward alone
    assert all(least < 2 * row["tflops"] / row["samples_per_s"] < 4 * least for row in rows[1:])
    assert rows[1]["cons"] == 0 < min(rows[2][name] for name in objective.PAPER), "B starts at zero"
    assert Image.open(folder / "samples" / "000002.png").size == (3 * 96, 96)
    assert Image.open(folder / "curves.png").width > 900
    assert len(list(folder.glob("val/lr/*"))) == len(list(folder.glob("val/hr/*"))) == 1
    assert state(folder)["step"] == 3 and not list(folder.rglob("*.tmp"))
    image = Image.open(next((folder / "val" / "lr").iterdir()))
    adapted = SanaSR.from_pretrained(tiny_model, adapter=folder / "adapter.safetensors")
    assert adapted.timestep == 900 and adapted.restore(image) != sana.restore(image, suffix="none")


def test_ema_starts_fast_and_optimiser_is_the_papers(run):
    folder = run("r", "--steps", 2, "--every", 1)
    first, second = (load_file(folder / "checkpoints" / f"00000{i}.safetensors") for i in (1, 2))
    saved = state(folder)
    group = saved["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-5, (0.9, 0.999), 1e-8, 1e-2)
    dit = LinearDiT.from_pretrained(Path(saved["settings"]["model"]) / "transformer")
    inject_lora(dit, saved["settings"]["rank"])
    names, decay = list(lora_parameters(dit)), 2 / 12
    for key in (next(k for k in names if kind in k) for kind in ("lora_A", "lora_B")):
        master = saved["masters"][names.index(key)]
        assert torch.allclose(second[key], decay * first[key] + (1 - decay) * master, atol=1e-9) and master.any()


def test_switches_take_losses_away(here, run, photos, on_loss):
    seen, names = [], set()
    on_loss(None, lambda values, batch, tau: names.update(batch["name"]) or seen.append(
        (sorted(values), *batch["t"].tolist(), tau)))
    folder = run("r", "--steps", 12, "--no-align", "--no-cons", "--timestep", 950, "--protocol", "lq")
    assert names == {p.path for p in trained_on(photos, here)}, "--val 0 holds out as much"
    assert all(terms == ["loss", "mse"] and 20 <= t <= 980 and tau == 950 for terms, t, tau in seen)
    assert any(not 70 <= t <= 650 for _, t, _ in seen), "the lq protocol's range"
    rows = read_log(folder / "log.csv")[1:]
    assert all(row["loss"] == row["mse"] > 0 and not row.keys() & {"lpips", "align", "cons"} for row in rows)
    assert (trained(folder)[0]["terms"], trained(folder)[0]["timestep"]) == ("mse", "950.0")
    assert trained(run("l", "--steps", 1, "--latent"))[0]["terms"] == "latent align cons"


def test_usm_sharpens_the_pictures_that_are_learned_and_tiles_change_nothing(here, run, on_loss):
    seen = []
    on_loss(None, lambda values, batch, tau: seen.append(batch))
    for name, options in (("plain", []), ("sharp", ["--usm"]), ("tiled", ["--cache", "tiles"])):
        run(name, "--steps", 1, *options)
    plain, sharp, tiled = (batch["x_H"][0] / 2 + 0.5 for batch in seen)
    assert torch.equal(tiled, plain) and len(list(here.glob("tiles/*/*.png"))) == 1
    assert seen[0]["name"] == seen[1]["name"] and (plain - sharp).abs().max() > 0.01
    assert torch.allclose(sharp, sharpen(plain), atol=1e-4)


def test_init_decides_rank_and_targets_and_all_say_so(here, run, tiny_model, capsys):
    both = tiny.tiny_adapter(here / "both.safetensors", tiny_model, 4, "attn+ffn")
    folder = run("as-init", "--steps", 1, "--init", both)
    metadata, ranks = trained(folder)
    assert same(folder / "checkpoints" / "000000.safetensors", both) and not same(folder / "adapter.safetensors", both)
    assert ranks == {4} and (metadata["rank"], metadata["lora_targets"]) == ("4", "attn+ffn")
    assert "(rank 4, attn+ffn)" in capsys.readouterr().out
    attn = tiny.tiny_adapter(here / "attn.safetensors", tiny_model, 4, "attn")
    mixed = run("mixed", "--steps", 1, "--init", attn, "--rank", 16, "--lora-targets", "attn+ffn")
    metadata, ranks = trained(mixed)
    assert ranks == {4, 16} and (metadata["rank"], metadata["lora_targets"]) == ("4 16", "attn+ffn")
    assert "(rank 4 and 16, attn+ffn)" in capsys.readouterr().out
    model = SanaSR.from_pretrained(tiny_model, adapter=mixed / "adapter.safetensors", merge=False)
    assert {m.adapter_scale for m in lora_modules(model.dit).values()} == {1.0}
    assert train.main(["--name", "mixed", "--resume", "--steps", "2"]) == 0 and trained(mixed)[1] == {4, 16}
    (here / "no.safetensors").write_text("no adapter")
    for options, message in ((["--rank", 8], "--rank 8: --init .* has rank 4.*--init none"),
                             (["--lora-targets", "attn"], "adapts the Mix-FFN too.*--init none"),
                             (["--init", "no.safetensors"], "no.safetensors: not a whole safetensors file")):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run("refused", "--init", both, *options)


def test_a_models_own_adapter_is_where_training_starts(here, run, tiny_model):
    model = shutil.copytree(tiny_model, here / "model")
    own = tiny.tiny_adapter(model / "adapter.safetensors", model, 4, "attn")
    folder = run("r", "--model", model, "--steps", 1, "--val", 1)
    assert same(folder / "checkpoints" / "000000.safetensors", own) and not same(folder / "adapter.safetensors", own)
    lr, hr = (Image.open(next((folder / "val" / kind).iterdir())) for kind in ("lr", "hr"))
    pictures = (SanaSR.from_pretrained(model, adapter=adapter).restore(lr) for adapter in (None, False))
    with_own, without = (metrics.load("lpips")(to_tensor(x)[None], to_tensor(hr)[None]).item() for x in pictures)
    start = read_log(folder / "log.csv")[0]["val_lpips"]
    assert start == pytest.approx(with_own, abs=1e-5) and abs(start - without) > 1e-4
    assert trained(run("none", "--model", model, "--steps", 1, "--init", "none"))[1] == {64}


def test_killed_and_resumed_equals_uninterrupted(here, run, line):
    options = ["--steps", "20", "--every", "10"]
    whole, killed = run("whole", *options), here / "runs" / "killed"
    ended = in_a_process("train", "objective", "losses", 15, "os.kill(os.getpid(), 9)", line("killed", *options))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert state(killed)["step"] == 10
    assert train.main(["--name", "killed", "--resume"]) == 0
    assert same(whole / "adapter.safetensors", killed / "adapter.safetensors")
    assert [row["step"] for row in read_log(killed / "log.csv")] == list(range(21)), "the log has no step twice"


@pytest.mark.parametrize("signals, code, step, says", [
    ([signal.SIGTERM], 143, 3, "step 3 is saved, `--name stopped --resume` resumes"),
    ([signal.SIGINT] * 2, 130, 2, "steps after 2 are lost; `--name stopped --resume` resumes")])
def test_a_signal_within_a_step_saves_and_a_second_one_loses(run, on_loss, capsys, signals, code, step, says):
    options = ["--steps", 5, "--every", 2, "--accumulate", 2]
    whole = run("whole", *options)
    on_loss(5, lambda *_: any(os.kill(os.getpid(), number) for number in signals))
    folder = run("stopped", *options, code=code)
    assert says in "".join(capsys.readouterr()) and state(folder)["step"] == step
    assert train.main(["--name", "stopped", "--resume"]) == 0
    assert same(whole / "adapter.safetensors", folder / "adapter.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves(here, line, number):
    stopped = in_a_process("train", "objective", "losses", 2, f"os.killpg(0, {int(number)})",
                           line("group", "--workers", 1, "--steps", 1000))
    assert stopped.returncode == 128 + number, stopped.stderr
    assert state(here / "runs" / "group")["step"] == 2


def test_nan_stops_and_names_the_samples(here, run, on_loss):
    on_loss(3, lambda values, *_: values | {k: values[k] * math.nan for k in ("loss", "mse")})
    with pytest.raises(SystemExit, match="^error: step 3: loss nan.*the save of step 2 is unharmed"):
        run("r", "--steps", 5, "--every", 2)
    folder = here / "runs" / "r"
    report = json.loads((folder / "nan_rank0.json").read_text())
    assert (report["step"], report["loss"], report["mse"]) == (3, "nan", "nan") and report["align"] != "nan"
    assert Path(report["name"][0]).is_file() and report["prompt"] and 70 <= float(report["t"][0]) <= 650
    assert state(folder)["step"] == 2
    assert all(x.isfinite().all() for x in load_file(folder / "adapter.safetensors").values())


def test_a_full_disk_leaves_the_last_state(here, run, monkeypatch):
    save, count = torch.save, []

    def full(content, f):
        count.append(1)
        if len(count) == 3:
            f.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="^error: .*state.pt cannot be written .No space left"):
        run("r", "--steps", 4, "--every", 2)
    assert state(here / "runs" / "r")["step"] == 2
    assert not list((here / "runs").rglob("*.tmp"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_errs_like_rounded_weights(here, run, dtype):
    """The measure is what rounding the weights to bfloat16 does to a gradient that is computed in float32."""
    def gradient(name, *options):  # AdamW's first moment after one step is a tenth of it
        folder = run(name, "--steps", 1, *options)
        assert all(x.dtype == torch.float32 for x in load_file(folder / "adapter.safetensors").values())
        return torch.cat([v["exp_avg"].flatten() for v in state(folder)["optimizer"]["state"].values()])
    exact, half = gradient("exact"), gradient("half", "--dtype", dtype)
    rounded = gradient("rounded", "--model", tiny.tiny_model(here / "rounded", torch.bfloat16))
    assert 0 < relative(half, exact) < 3 * relative(rounded, exact) < 0.2


def test_accumulated_batches_and_two_processes_equal_one_batch_of_twice_the_size(here, run, line):
    # AdamW magnifies a gradient's rounding where the gradient is near its eps: with this seed there is no such weight
    one, ways = run("one", "--batch", 2, "--seed", 2), [run("accumulated", "--accumulate", 2, "--seed", 2)]
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train.py",
                  *line("two", "--seed", 2), cwd=here, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    a = load_file(one / "adapter.safetensors")
    for way in (*ways, here / "runs" / "two"):
        b = load_file(way / "adapter.safetensors")
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-6 < max(a[k].abs().max() for k in a if "lora_B" in k)
        for x, y in zip(read_log(one / "log.csv"), read_log(way / "log.csv"), strict=True):
            assert all(math.isclose(x[k], y[k], rel_tol=1e-4) for k in x if k in ("loss", *objective.PAPER))


def test_resume_refuses_what_changed(here, run, photos, tiny_model, monkeypatch):
    hq, model = shutil.copytree(photos, here / "hq"), shutil.copytree(tiny_model, here / "model")
    table, prior, terms = here / "tags.csv", next((model / "transformer").glob("*.safetensors")), objective.PAPER
    table.write_text("image,tags\n" + "".join(f"{p.name},tree\n" for p in photos.rglob("*.*")))
    folder = run("r", "--data", hq, "--model", model, "--tags", table, "--steps", 1)
    before, lines, weight = (path.read_bytes() for path in (folder / "state.pt", table, prior))

    def refused(message, *options):
        with pytest.raises(SystemExit, match=f"^error: runs/r was begun with other settings: {message}; start anew"):
            train.main(["--name", "r", "--resume", *options])
    refused(r"--rank 8 \(was 64\)", "--rank", "8")
    refused(r"--protocol lq \(was hq\), --timestep 999.0 .*", "--protocol", "lq")
    refused("--batch times --accumulate times the processes changed", "--batch", "2")
    refused("--data .*", "--data", str(hq / "deep"))
    refused("the losses changed", "--no-cons")
    for patch in (lambda m: m.setitem(terms, "align", 0.5),
                  lambda m: m.delitem(terms, "cons"), lambda m: m.setitem(terms, "lattice", 1.0)):
        with monkeypatch.context() as m:
            patch(m)
            refused("the losses changed")
    with monkeypatch.context() as m:
        m.setattr(train, "EMA", 0.99)
        refused("the constants changed")
    table.write_bytes(lines.replace(b"tree", b"cat"))
    refused("the tags changed")
    table.write_bytes(lines)
    save_file({k: v + 1 for k, v in load_file(prior).items()}, prior)
    refused("the model changed")
    prior.write_bytes(weight)
    save_photo(hq / "new.png", 128, 128, 77)
    refused("the photos changed, .*")
    (hq / "new.png").unlink()
    assert (folder / "state.pt").read_bytes() == before
    assert train.main(["--name", "r", "--resume", "--steps", "2"]) == 0


def test_resumed_by_its_own_line_where_something_was_unavailable(line, monkeypatch):
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", Mock(side_effect=weights.Unavailable("not here")))
    assert train.main(line("r", "--tags", "ram", "--steps", 1)) == 0
    assert train.main(line("r", "--tags", "ram", "--steps", 2, "--resume")) == 0
    with pytest.raises(SystemExit, match=r"--tags dape \(was none\)"):
        train.main(line("r", "--tags", "dape", "--resume"))


@pytest.mark.parametrize("options, message", [
    ("--name r", "holds a run"), ("--name other --resume", "nothing to resume"), ("--model no-such", "no-such"),
    ("--crop 100", "multiple of 32"), ("--crop 64", "at least 80"), ("--tags no.csv", "no.csv"),
    ("--workers -1", "--workers must be at least 0, not -1"), ("--lr -1", "--lr must be above 0, not -1"),
    ("--lr nan", "--lr must be above 0, not nan"), ("--timestep 1001", "above 0 and at most 1000, not 1001"),
    ("--accumulate 0", "--accumulate must be at least 1, not 0"), ("--no-mse --no-align --no-cons", "no loss is left"),
    ("--texture 1", "--learn adapter does not take --texture"),
    ("--learn autoencoder --no-lpips", "--learn autoencoder does not take --crop .* --no-lpips"),
    ("--name r --select psnr --lq .", "--lq DIR --data DIR, both"),
    ("--name r --resume", "state.pt cannot be read"), ("--name r --select psnr", "state.pt cannot be read")])
def test_bad_settings_are_one_line(here, line, capsys, options, message):
    (here / "runs" / "r").mkdir(parents=True)
    (here / "runs" / "r" / "state.pt").touch()
    alone = "--select" in options or "--resume" in options
    with pytest.raises(SystemExit) as end:
        train.main(options.split() if alone else line("n", *options.split()))
    said = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert re.search(f"error: .*{message}", said) and "\n" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_vanishes_is_one_line(run, monkeypatch, workers):
    scan, gone = pairs.scan, Mock(side_effect=OSError(errno.ENOENT, "No such file or directory"))
    monkeypatch.setattr(pairs, "scan", lambda *a: [scan(*a), monkeypatch.setattr(pairs, "read", gone)][0])
    with pytest.raises(SystemExit, match=r"^error: /.*can no longer be read: No such file") as error:
        run("r", "--workers", workers)
    assert "\n" not in str(error.value)


def test_workers_never_exceed_the_cores(line):
    assert train.parse(line("nobody", "--workers", 999)).workers == len(os.sched_getaffinity(0))


def test_knee_stops_the_run(run, monkeypatch):
    values = iter([10, 6, 3, 1, 0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(train.Networks, "validate", lambda *a: (
        dict(zip(train.WATCHED, (next(values), 20.0, 0.0), strict=True)), Image.new("RGB", (3, 3))))
    folder = run("r", "--steps", 8, "--every", 1, "--val", 1, "--knee", 3)
    assert sorted(p.stem for p in (folder / "checkpoints").iterdir())[-1] == "000006"
    assert same(folder / "knee.safetensors", folder / "checkpoints" / "000003.safetensors")
    assert train.main(["--name", "r", "--resume"]) == 0, "which does not go on"
    assert trained(folder)[0]["step"] == "6" and same(folder / "adapter.safetensors", folder / "checkpoints" /
                                                      "000006.safetensors")


def test_a_mean_over_ranks_travels_in_messages(monkeypatch):
    sent, tensors = [], [noise(*s, dtype=torch.float32).squeeze() for s in ((3, 2), (5,), (1,), (4, 2), (1, 1))]
    monkeypatch.setattr(runs, "ranks", lambda: (0, 2))
    monkeypatch.setattr(runs.dist, "all_reduce", lambda x: sent.append((len(x), x.dtype)) or x.mul_(3))  # 1 + 2 times
    for wire, error in ((torch.float32, 1e-7), (torch.bfloat16, 1e-2)):
        means = [t.clone() for t in tensors]
        runs.average(means, wire, most=8)
        assert all(torch.allclose(a, 1.5 * b, rtol=error) for a, b in zip(means, tensors, strict=True))
    assert sent == [(n, wire) for wire in (torch.float32, torch.bfloat16) for n in (6, 6, 9)]


@pytest.mark.parametrize("photo, workers, says", [
    (3.0, 0, "it needs --workers 4, not 0"), (3.0, 2, "it needs --workers 8, not 2"), (0.05, 0, "")])
def test_too_few_loader_processes_are_told(monkeypatch, capsys, photo, workers, says):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])

    def loader(dataset, batch_sampler, **options):
        for _ in batch_sampler:
            clock[0] += photo
            yield 0
    monkeypatch.setattr(runs, "DataLoader", loader)
    for gpu in (False, True):
        for _ in runs.batches(None, 1, range(100), workers, None, gpu):
            clock[0] += 1  # a step
        said = capsys.readouterr().err
        assert said.count("\n") == bool(gpu and says) and (says in said or not gpu)


@pytest.mark.parametrize("lpips, psnr, says", [
    ((0.5, 0.45, 0.4), (20, 15, 19.9), ""), ((0.5, 0.3, 0.495), (20, 22, 20), "nothing was gained"),
    ((0.5, 0.4, 0.3), (20, 20, 19.7), "nothing was gained")])
def test_the_verdict_compares_the_first_validation_with_the_last(lpips, psnr, says):
    rows = [{"step": i, **dict(zip(train.WATCHED, (a, b, 0.01 * i), strict=True))}
            for i, (a, b) in enumerate(zip(lpips, psnr, strict=True))]
    said = train.verdict([*rows, {"step": 3, "loss": 1.0}])
    assert said.startswith(f"held-out LPIPS 0.5000 to {lpips[-1]:.4f}, PSNR 20.00 to {psnr[-1]:.2f} dB, "
                           "lattice 0.0000 to 0.0200")
    assert said.partition(": ")[2] == (says and f"{says}; keep the model as it was, or train longer")
    assert train.verdict(rows[:1]) == train.verdict([]) == ""


def test_select_ranks_by_the_scores_of_the_evaluator(line, seen, here):
    argv = line("r", "--every", 1, "--val", 1)
    argv.remove("--tags"), argv.remove("none")  # the default of this model: ram
    assert train.main(argv) == 0
    folder = here / "runs" / "r"
    lr, hr = (Image.open(next((folder / "val" / kind).iterdir())) for kind in ("lr", "hr"))
    for metric, sign, tolerance in (("psnr", -1, 0.05), ("lpips", 1, 1e-3)):
        seen.clear()
        assert train.main(["--name", "r", "--select", metric, "--device", "cpu"]) == 0
        assert [image.size for image in seen] == [hr.size], "tags of x_L, as at test time"
        names, scores = zip(*(row.split(",") for row in (folder / "select.csv").read_text().split()[1:]), strict=True)
        assert sorted(names) == [f"00000{i}.safetensors" for i in range(4)]
        assert list(scores) == sorted(scores, key=lambda score: sign * float(score))
        assert same(folder / "best.safetensors", folder / "checkpoints" / names[0])
        model = SanaSR.from_pretrained(state(folder)["settings"]["model"], adapter=folder / "checkpoints" / names[0])
        x, y = (to_tensor(image)[None] for image in (model.restore(lr, ["ram", f"{hr.width}", "tag 1"]), hr))
        assert float(scores[0]) == pytest.approx(metrics.load(metric)(x, y).item(), abs=tolerance)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(SystemExit, match="checkpoints is empty"):
        train.main(["--name", "r", "--select", "psnr", "--device", "cpu"])


@pytest.mark.slow
def test_one_step_at_official_size(capsys):
    """Batch 1, 512 crop, checkpointing, seeded weights: within 20 GB. Prints CPU seconds by part and the peak."""
    parts, official = {}, ((LinearDiT, "dit_sana_600m"), (DCAE, "dcae_f32c32_sana"))
    dit, vae = (seeded_module(on_meta(*part)) for part in official)
    torch.manual_seed(0)
    inject_lora(dit, 64)
    dit.checkpointing = vae.decoder.checkpointing = True
    vae = objective.Latents(vae, 0.41407)
    parameters = list(lora_parameters(dit).values())
    optimizer = torch.optim.AdamW(parameters, 5e-5)
    before = [p.detach().clone() for p in parameters]
    batch = {k: noise(*shape, seed=i).float().tanh() for i, (k, shape) in enumerate({
        "x_L": (1, 3, 512, 512), "x_H": (1, 3, 512, 512), "c": (1, 300, 2304), "noise": (1, 32, 16, 16)}.items())}
    batch |= {"m": torch.ones(1, 300), "t": torch.tensor([300.0]), "shift": torch.tensor([[3, 5]])}

    def timed(name, call):
        def wrapper(*args):
            start = time.process_time()
            result = call(*args)
            parts[name] = parts.get(name, 0) + time.process_time() - start
            return result
        return wrapper
    vae.encode, vae.decode = timed("encode both", vae.encode), timed("decode", vae.decode)
    f, f0 = timed("f twice", objective.in_float32(dit)), timed("f0 twice", objective.prior(dit))
    lpips = timed("LPIPS (AlexNet)", objective.load_lpips("alex", torch.device("cpu"), torch.float32)[0])
    values = objective.losses(f, f0, vae, batch, 900.0, lpips)
    timed("backward", values["loss"].backward)()
    timed("AdamW", optimizer.step)()
    moved = max((p - b).abs().max().item() for p, b in zip(parameters, before, strict=True))
    peak = peak_memory(torch.device("cpu"))
    with capsys.disabled():
        print(f"\n{sum(p.numel() for p in parameters) / 1e6:.1f} M trained; peak {peak:.2f} GB; CPU seconds: "
              + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + f"; sum {sum(parts.values()):.0f}")
    assert all(v.isfinite() for v in values.values()) and 0 < moved < 1e-3 and peak < 20
