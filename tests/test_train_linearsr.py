"""linearsr/train.py: stages, knees, resuming, errors, on the tiny model. lab/linearsr.py."""
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_a_process, python, save_photo, state
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lab.linearsr as lab
import trainer
from fast import load_model
from linearsr import LinearSR, flow, shifted, train, unshifted
from linearsr.flow import Held, interval, times
from objective import Conditions
from runs import read_log
from sanasr import LinearDiT
from trainer import knee

NEW = ["--crop", 96, "--pairs", 6, "--val", 2, "--val-steps", 2, "--batch", 2, "--rank", 2, "--device", "cpu"]
PRETRAIN = Path("runs/linearsr/pretrain")
pytestmark = pytest.mark.usefixtures("here")


def main(*options):
    return train.main([str(a) for a in options])


@pytest.fixture
def line(photos, tiny_model):
    """line(options…): the arguments of a pretraining of the tiny model."""
    return lambda *options: ["--stage", "pretrain", "--data", photos, "--model", tiny_model, *NEW, "--workers", 0,
                             *options]


@pytest.fixture
def run(line):
    """run("pretrain", …) trains, returns runs/linearsr/STAGE."""
    def start(stage, *options):
        assert main(*(line() if stage == "pretrain" else ["--stage", stage, "--workers", 0]), *options) == 0
        return Path("runs/linearsr") / stage
    return start


def settings(folder):
    return json.loads((folder / "settings.json").read_text())


def error_of(*options):
    with pytest.raises(SystemExit, match="^error: .*$") as caught:  # one line
        main(*options)
    return str(caught.value)


def test_three_stages_and_the_model_they_make(run, tiny_model, capsys):
    first = run("pretrain", "--steps", 3, "--every", 1)
    watched = [row for row in read_log(first / "log.csv") if "val_lpips" in row]
    assert [row["step"] for row in watched] == [0, 1, 2, 3]
    assert {"val_psnr", "val_flow", "val_flow_0", "val_flow_3"} <= set(watched[0])
    at = watched[knee([row["val_lpips"] for row in watched], train.TOLERANCE)]["step"]
    assert (192, 16, 16) in {colour for _, colour in Image.open(first / "curves.png").getcolors(2**20)}  # the knee
    experts = run("experts", "--steps", 2, "--every", 2)
    note = settings(experts / "2")
    assert note["start"] == {"network": f"runs/linearsr/pretrain/checkpoints/{at:06d}.safetensors", "adapter": None,
                             "at": "knee"}
    assert note["settings"]["rank"] == 2 and note["settings"]["pairs"] == 6  # taken over
    with safe_open(experts / "2" / "checkpoints" / "000002.safetensors", "pt") as file:
        assert {"system": "linearsr", "interval": "0.875 0.939", "expert": "2"}.items() <= file.metadata().items()
        assert any(file.get_tensor(key).abs().max() > 0 for key in file.keys() if "lora_B" in key)
    tuned = run("finetune", "--steps", 1, "--every", 1, "--start", "end")
    assert settings(tuned / "1")["start"]["adapter"] == "runs/linearsr/experts/1/checkpoints/000002.safetensors"
    capsys.readouterr()
    assert main("--stage", "export", "--to", "made", "--start", "end") == 0
    assert "4 expert(s)" in capsys.readouterr().out
    restorer = LinearSR.from_pretrained("made")
    assert len(restorer.experts) == 4 and restorer.folder.samefile(tiny_model)
    assert restorer.restore(Image.new("RGB", (24, 24)), steps=1).size == (96, 96)
    assert main("--stage", "export", "--to", "made", "--of", "pretrain", "--start", "end") == 0
    (expert,) = LinearSR.from_pretrained("made").experts  # nothing of the first export is left
    network = load_file(first / "checkpoints" / "000003.safetensors")
    assert torch.equal(expert.proj_out.weight, network["dit.proj_out.weight"].float())


def test_a_stage_takes_over_the_settings_of_those_before_it_alone(run, photos):
    """Also where a later one has been trained and the stage's own folder is gone."""
    run("pretrain", "--steps", 1, "--every", 1)
    short = "--steps", 1, "--every", 1, "--boundaries"
    experts = run("experts", *short)
    before = settings(experts / "0")["settings"]
    shutil.copytree(photos, "best")
    run("finetune", *short, "--data", "best", "--lr", 1e-3, "--val", 1)
    shutil.rmtree(experts)
    run("experts", *short)
    assert settings(experts / "0")["settings"] == before and before["data"] == [str(photos.resolve())]
    for line, expected in (("export --to x", 1), ("export --to x --of experts", 2), ("finetune", 1)):
        assert train.parse(["--stage", *line.split()]).val == expected
    assert train.parse(["--stage", "finetune"]).lr == 1e-3


def test_an_export_is_as_its_training_was(run):
    run("pretrain", "--steps", 1, "--every", 1, "--suffix", "main")
    run("experts", "--steps", 1, "--every", 1, "--suffix", "none", "--boundaries", 0.5)
    for line in (["export", "--to", "made"], ["finetune", "--steps", 1, "--workers", 0]):
        assert "experts/0 was trained with --boundaries 0.5" in error_of("--stage", *line, "--boundaries", 0.9)
    assert not Path("made").exists()
    assert "experts/0 was begun with other settings: --start end (was knee)" in error_of(
        "--stage", "experts", "--start", "end", "--steps", 2, "--workers", 0)
    assert "--dtype bf16 (was fp32)" in error_of("--stage", "experts", "--dtype", "bf16", "--steps", 2, "--workers", 0)
    for of, suffix in (("pretrain", "main"), ("experts", "none")):
        assert main("--stage", "export", "--to", "made", "--of", of) == 0
        assert json.loads(Path("made/config.json").read_text())["suffix"] == suffix
    shutil.rmtree("runs/linearsr/experts/0")
    assert "experts/0 holds no training" in error_of("--stage", "export", "--to", "x"), "no network without its experts"
    PRETRAIN.rename("elsewhere")
    assert main("--stage", "export", "--to", "made", "--of", "pretrain", "--pretrained", "elsewhere") == 0


def test_a_model_of_sana_sr_shares_its_transformer(run, photos, tiny_model):
    """Without LR pictures the stem learns nothing; an export on a model with the same transformer stores none."""
    folder = run("pretrain", "--steps", 2, "--every", 2, "--unconditional", 1)
    assert run("pretrain", "--steps", 2, "--every", 2) == folder  # a share that is not given is the run's own
    network = load_file(folder / "checkpoints" / "000002.safetensors")
    assert not network["stem.proj.weight"].any() and network["dit.proj_out.weight"].any()
    export = ["--stage", "export", "--start", "end", "--to"]
    assert main(*export, "alone") == 0
    shutil.copytree(tiny_model, "model")
    shutil.rmtree("model/transformer")
    shutil.copytree("alone/transformer", "model/transformer")
    assert main(*export, "shared", "--model", "model") == 0 and not Path("shared/transformer").exists()
    photo = Image.new("RGB", (24, 24), (200, 30, 30))
    alone, shared = (LinearSR.from_pretrained(name).restore(photo, steps=2) for name in ("alone", "shared"))
    assert alone.tobytes() == shared.tobytes()
    assert "--to model is the folder of a model of SANA-SR" in error_of(*export, "model/.", "--model", "model")
    config = Path("model/transformer/config.json")  # which the export would have taken away
    config.write_text(config.read_text().replace('"sample_size": 4', '"sample_size": 3'))  # for the small photos
    assert lab.main(["losses", "--model", "shared", "--device", "cpu", "--data", str(photos), "--draws", "1", "--val",
                     "1"]) == 0
    for side, kind in ((32, "lr"), (128, "hr")):
        save_photo(Path(kind, "a.png"), side, side, 0)
    assert lab.main(["table", "--model", "shared", "--sanasr", "model", "--device", "cpu", "--lr", "lr", "--hr", "hr",
                     "--metrics", "psnr", "--only", "bicubic"]) == 0


def test_held_out_loss_falls(run):
    rows = read_log(run("pretrain", "--steps", 60, "--every", 60, "--lr", 2e-3) / "log.csv")
    assert rows[-1]["val_flow"] < 0.8 * rows[0]["val_flow"]


def test_times_are_the_steps_of_the_sampler_in_the_interval():
    u = torch.linspace(0, 0.999, 1000)
    for k, (low, high) in enumerate([(0, 0.223), (0.223, 0.875), (0.875, 0.939), (0.939, 1)]):
        t = times(u, interval(k, (0.223, 0.875, 0.939)))
        assert interval(k, (0.223, 0.875, 0.939)) == (low, high)
        assert low - 1e-6 <= t.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < t.max() <= high + 1e-6
    assert interval(0, ()) == interval(None, (0.5,)) == (0, 1)
    assert torch.allclose(times(u, (0.0, 1.0)), 3 * u / (1 + 2 * u))


def test_an_expert_begins_as_the_shared_network_and_sees_its_own_interval(run, monkeypatch):
    run("pretrain", "--steps", 1, "--every", 1)
    seen, loss = [], train.flow_loss
    monkeypatch.setattr(train, "flow_loss", lambda network, z, t, *rest: (
        seen.extend(t.tolist()) or loss(network, z, t, *rest)))
    experts = run("experts", "--steps", 20, "--every", 20, "--expert", 2)
    assert len(seen) == 40 and 0.875 <= min(seen) < 0.885 and 0.93 < max(seen) <= 0.939
    middle = shifted((unshifted(0.875) + unshifted(0.939)) / 2)  # a batch is stratified: one time in each half
    assert all(a < middle <= b for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert [path.name for path in experts.iterdir()] == ["2"]
    expert = load_file(experts / "2" / "checkpoints" / "000000.safetensors")
    assert all(x.abs().max() == 0 for key, x in expert.items() if "lora_B" in key)


def test_the_draws_of_a_photo_cover_the_interval(monkeypatch):
    monkeypatch.setattr(flow, "flow_loss", lambda network, z, t, *rest: t)
    held = object.__new__(Held)
    held.z = held.c = held.m = held.lr = torch.zeros(5, 1, 1, 1)
    t = held.flow(None, (0.223, 0.875), draws=4)
    u = (unshifted(t) - unshifted(0.223)) / (unshifted(0.875) - unshifted(0.223))
    assert t.shape == (5, 4) and (u * 4).floor().tolist() == [[0, 1, 2, 3]] * 5


def test_knee():
    assert knee([10, 6, 3, 1, 0.9, 0.8, 0.7, 0.6]) == 3
    assert knee([5, 4, 3, 2, 1]) == 4  # still falling
    assert knee([1, 2, 3]) == 0 and knee([1.0]) == 0  # never falls
    assert knee([10, 5, 2, 1.9, 2.1, 1.9, 2.2, 3, 4]) == 2  # oscillates, then rises
    assert knee([10, 8, 0, 7, 6, 5, 5, 5]) == 5  # a single dip is no knee
    assert knee([10, 5, 4, 4, 4, 1]) == 2  # nor at the end


def same_state(a, b):
    """Whether steps, weights, averaged weights and moments of two runs are equal."""
    a, b = ([torch.tensor(s["step"]), *s["masters"], *s["ema"],
             *(m[k] for m in s["optimizer"]["state"].values() for k in ("exp_avg", "exp_avg_sq"))]
            for s in map(state, (a, b)))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def columns_of(folder):
    return [{key: row[key] for key in row.keys() - {"samples_per_s", "tflops", "memory_gb"}}
            for row in read_log(folder / "log.csv")]


def test_a_step_is_a_cuda_graph_on_every_rank(monkeypatch):
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    assert [train.capturable(SimpleNamespace(device=torch.device(device), checkpointing=checkpointing))
            for device, checkpointing in (("cuda", False), ("cuda", True), ("cpu", False))] == [True, False, False]


def test_as_a_cuda_graph_it_trains_the_same(run, captured, monkeypatch):
    averaged = []
    monkeypatch.setattr(train, "capturable", lambda args: True)
    monkeypatch.setattr(trainer, "average", lambda tensors, *_: averaged.append({x.data_ptr() for x in tensors}))
    graphed = run("pretrain", "--steps", 5, "--every", 5).rename("graphed")
    assert captured and averaged[0] == averaged[2] == averaged[8], "gradients are averaged where the graph writes them"
    for steps in (2, 5):
        run("pretrain", "--steps", steps, "--every", steps, "--name", "again")
    assert same_state(graphed, Path("runs/again/pretrain"))
    monkeypatch.setattr(train, "capturable", lambda args: False)
    eager = columns_of(run("pretrain", "--steps", 5, "--every", 5))
    assert [pytest.approx(row, rel=1e-3) for row in eager] == columns_of(graphed)


def test_conditions_pad_to_a_length_and_forget_the_oldest(tiny_model, monkeypatch):
    conditions = Conditions(load_model(tiny_model, torch.device("cpu"), torch.float32, adapter=False))
    prompts = ["tree", "a house by the water", ""]
    c, m = conditions(prompts)
    assert conditions.longest(prompts) == c.shape[1] and len(conditions.kept) == 3
    monkeypatch.setattr(Conditions, "KEPT", 1)
    longer, mask = conditions(prompts[:2] + [" "], c.shape[1] + 3)
    assert longer.shape[1] == mask.shape[1] == c.shape[1] + 3 and len(conditions.kept) == 1
    assert torch.equal(longer[:2, :-3], c[:2]) and torch.equal(mask[:2, :-3], m[:2])
    assert not longer[:, -3:].any() and not mask[:, -3:].any()


@pytest.mark.parametrize("number, code, reached", [
    (signal.SIGINT, 130, 7), (signal.SIGTERM, 143, 7), (signal.SIGKILL, -9, 5)])
def test_a_stopped_or_killed_expert_goes_on_as_if_it_had_not_been(run, number, code, reached):
    run("pretrain", "--steps", 1, "--every", 1)
    folder, options = Path("runs/linearsr/experts/1"), ["--every", 5, "--expert", 1, "--steps"]
    ended = in_a_process("linearsr.train", "linearsr.train", "flow_loss", 7, f"os.kill(os.getpid(), {int(number)})",
                         ["--stage", "experts", "--workers", 0, *options, 100])
    assert ended.returncode == code and state(folder)["step"] == reached, ended.stderr
    assert code < 0 or "step 7 is saved, rerun to resume" in ended.stdout
    run("experts", *options, 10)
    stopped = folder.rename("stopped")
    run("experts", *options, 10)
    assert same_state(stopped, folder) and columns_of(stopped) == columns_of(folder)  # no step is lost, or there twice
    assert all(path.read_bytes() == (stopped / "checkpoints" / path.name).read_bytes()
               for path in (folder / "checkpoints").iterdir())


def test_two_processes_equal_one_with_twice_the_batch(run, line):
    one = state(run("pretrain", "--steps", 3, "--every", 3))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "linearsr.train", *line(
        "--steps", 3, "--every", 3, "--name", "two", "--batch", 1), cwd=None, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    two = state(Path("runs/two/pretrain"))
    # the mean gradients: AdamW magnifies their rounding where they are near its eps
    a, b = (torch.cat([s["exp_avg"].flatten() for s in x["optimizer"]["state"].values()]) for x in (one, two))
    assert one["step"] == two["step"] == 3 and (a - b).norm() < 1e-5 * a.norm()


def test_pairs_are_encoded_once_and_again_where_one_is_missing_or_the_code_is_new(run, monkeypatch):
    monkeypatch.setattr(flow, "SHARD", 4)
    run("pretrain", "--steps", 1, "--every", 1)
    files = sorted(Path("runs/pairs").glob("*/*.safetensors"))
    before, more = map(load_file, files)
    assert before["z"].shape == (4, 8, 3, 3) and more["lr"].shape == (2, 3, 24, 24)
    assert before["lr"].dtype == torch.uint8
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    run("pretrain", "--steps", 2, "--every", 1)
    assert files[0].stat().st_mtime_ns == stamp
    assert all(torch.equal(x, load_file(files[1])[key]) for key, x in more.items())
    monkeypatch.setattr(flow, "DEGRADE_VERSION", -1)
    run("pretrain", "--steps", 3, "--every", 1)
    assert len(list(Path("runs/pairs").iterdir())) == 2


def test_errors(run, line, tiny_model):
    assert "runs/linearsr/pretrain holds no training" in error_of(*line("--stage", "experts"))
    run("pretrain", "--steps", 1, "--every", 1)
    assert "begun with other settings: --mild 0.5 (was 0.0); start anew under another --name" in error_of(
        *line("--steps", 2, "--mild", 0.5))
    (PRETRAIN / "log.csv").unlink()
    assert "log.csv has no validations: raise --steps" in error_of(*line("--steps", 1))
    torch.save(state(PRETRAIN) | {"masters": []}, PRETRAIN / "state.pt")
    assert "state.pt does not fit this training" in error_of(*line("--steps", 1))
    config = json.loads((tiny_model / "transformer" / "config.json").read_text())
    dit = LinearDiT(config | {"num_attention_heads": 3, "cross_attention_dim": 96})
    with pytest.raises(ValueError, match="1.safetensors was trained from another prior"):
        train.load_network(flow.Network(dit, train.Stem({"width": 96})),
                           next((PRETRAIN / "checkpoints").glob("*1.safetensors")))


@pytest.mark.parametrize("options, message", [
    ("--boundaries 0.9 0.5", "boundaries must rise"), ("--pairs-seed -1", "--pairs-seed must be at least 0"),
    ("--expert 4", "--expert must be 0 to 3"), ("--mild 2", "--mild must be at least 0 and at most 1"),
    ("--dtype fp16", "--dtype fp16: gradients here lie below its range"),
    ("--unconditional 0.5", "--unconditional belongs to the stage pretrain"),
    ("--stage pretrain --expert 1", "--expert and --pretrained belong to the later stages")])
def test_bad_options(options, message, capsys, photos):
    with pytest.raises(SystemExit) as end:
        main("--stage", "experts", "--data", photos, *options.split())
    assert message in f"{end.value.code} {capsys.readouterr().err}"


def test_lab_measures_losses_and_makes_the_table(run, photos, tiny_model, capsys):
    pretrained = run("pretrain", "--steps", 1, "--every", 1)
    run("experts", "--steps", 1, "--every", 1, "--start", "end")
    assert main("--stage", "export", "--to", "made", "--start", "end") == 0
    capsys.readouterr()
    config = Path("made/transformer/config.json")
    config.write_text(config.read_text().replace('"sample_size": 4', '"sample_size": 3'))
    common = ["--model", "made", "--device", "cpu"]
    assert lab.main(["losses", *common, "--data", str(photos), "--draws", "2", "--val", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line[:14] for line in lines] == ["0.000 to 0.223", "0.223 to 0.875", "0.875 to 0.939", "0.939 to 1.000"]
    assert all(float(value) > 0 for line in lines for value in line.split()[3:6])

    for kind, side in (("lr", 32), ("hr", 128)):
        save_photo(Path(kind, "a.png"), side, side, 0)
    trained = ["--pretrained", str(pretrained), "--steps", "2", "--every", "1"]
    table = ["table", *common, "--lr", "lr", "--hr", "hr", "--sanasr", str(tiny_model), "--metrics", "psnr,lpips",
             *trained, "--only"]
    assert lab.main([*table, "bicubic", "sana-sr", "steps-1-0"]) == 0
    models = ["models", *trained, "--device", "cpu", "--options", "--lr 1e-3 --batch 1"]
    assert lab.main([*models, "--only", "two-1"]) == 0
    note = settings(Path("runs/lab-linearsr/two-1/experts/1"))["settings"]
    assert note["lr"] == 1e-3 and note["batch"] == 1
    made = json.loads(Path("runs/lab-linearsr/models/two-1/config.json").read_text())
    assert made["_provenance"]["steps"] == [1, 1] and made["boundaries"] == [0.875]  # the end, wherever the knee is
    with pytest.raises(SystemExit, match="no model fine-0; there are pretrained-0"):  # without --best
        lab.main([*models, "--only", "fine-0"])
    shutil.rmtree("runs/lab-linearsr/two-1")  # as if trained on another machine
    assert lab.main([*table, "bicubic", "sana-sr", "steps-1-0", "steps-2-0", "two-1"]) == 0
    printed = capsys.readouterr().out
    assert "LinearSR, 2 steps, seed 0" in printed and "two experts, seed 1" in printed and "GMAC" in printed
    assert not Path("runs/lab-linearsr/two-1").exists()
    def dots(colour):
        return (np.asarray(Image.open("runs/lab-linearsr/compute.png")) == colour).all(-1).sum()
    assert (before := dots((0xc0, 0x10, 0x10))) and dots((0x10, 0x40, 0xc0))  # SANA-SR's, LinearSR's
    lab.main([*table, "steps-1-0", "--also", "another", "1", "0.5"])
    assert dots((0xc0, 0x10, 0x10)) > before
    with pytest.raises(SystemExit, match=r"two-1: its experts have \[1, 1\] steps, not 4 each"):
        lab.main([*models, "--steps", "8", "--only", "two-1"])
    assert lab.main([*table, "bicubic", "--metrics", "psnr", "--out", "other"]) == 0  # no LinearSR: no drawing
    assert not Path("other/compute.png").exists()
    assert lab.main([*models, "--only", "pretrained-0"]) == 0
    assert len(LinearSR.from_pretrained("runs/lab-linearsr/models/pretrained-0").experts) == 1


def test_bootstrap_holds_the_mean():
    x = np.random.default_rng(0).standard_normal(500)
    low, high = lab.bootstrap(x)
    assert low < x.mean() < high and 0.13 < high - low < 0.23  # 2 · 1.96 / √500 = 0.175
