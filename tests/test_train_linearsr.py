"""train_linearsr.py: stages, knees, resuming, errors, on the tiny model."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from seeded import seeded_input

import lab.linearsr as lab
from linearsr import LinearSR, shifted, unshifted
from linearsr import train as train_linearsr
from linearsr.train import interval, times
from objective import Conditions
from runs import knee, load_model, read_log


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        x = seeded_input(f"photo {i}", (3, 6, 6)).mul(60).add(128).clamp(0, 255).byte()
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((128 + 4 * i, 112), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs are kept below the test's own folder; bits depend on the number of threads."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(photos, tiny_model):
    """run("pretrain", …) trains, returns runs/linearsr/STAGE."""
    def start(stage, *options):
        new = () if stage != "pretrain" else (
            "--data", photos, "--model", tiny_model, "--crop", 96, "--pairs", 6, "--val", 2, "--val-steps", 2,
            "--batch", 2, "--rank", 2, "--workers", 0, "--device", "cpu")
        assert train_linearsr.main([str(a) for a in ("--stage", stage, *new, "--workers", 0, *options)]) == 0
        return Path("runs/linearsr") / stage
    return start


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def error_of(*options):
    with pytest.raises(SystemExit) as caught:
        train_linearsr.main([str(a) for a in options])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_three_stages_and_the_model_they_make(run, tiny_model, tmp_path, capsys):
    first = run("pretrain", "--steps", 3, "--every", 1)
    rows = read_log(first / "log.csv")
    watched = [row for row in rows if "val_lpips" in row]
    assert [row["step"] for row in watched] == [0, 1, 2, 3]
    assert {"val_psnr", "val_flow", "val_flow_0", "val_flow_3"} <= set(watched[0])
    at = watched[knee([row["val_lpips"] for row in watched], train_linearsr.TOLERANCE)]["step"]
    assert (192, 16, 16) in {colour for _, colour in Image.open(first / "curves.png").getcolors(2**20)}  # the knee
    experts = run("experts", "--steps", 2, "--every", 2)
    note = json.loads((experts / "2" / "settings.json").read_text())
    assert note["start"] == {"network": f"runs/linearsr/pretrain/checkpoints/{at:06d}.safetensors", "adapter": None,
                             "at": "knee"}
    assert note["settings"]["rank"] == 2 and note["settings"]["pairs"] == 6  # taken over
    state, metadata = tensors(experts / "2" / "checkpoints" / "000002.safetensors")
    assert metadata["system"] == "linearsr" and metadata["interval"] == "0.875 0.939" and metadata["expert"] == "2"
    assert any(x.abs().max() > 0 for key, x in state.items() if "lora_B" in key)
    run("finetune", "--steps", 1, "--every", 1, "--start", "end")
    note = json.loads((Path("runs/linearsr/finetune/1/settings.json")).read_text())
    assert note["start"]["adapter"] == "runs/linearsr/experts/1/checkpoints/000002.safetensors"
    capsys.readouterr()
    assert train_linearsr.main(["--stage", "export", "--to", "made", "--start", "end"]) == 0
    assert "4 expert(s)" in capsys.readouterr().out
    restorer = LinearSR.from_pretrained("made")
    assert len(restorer.experts) == 4 and restorer.folder.samefile(tiny_model)
    assert restorer.restore(Image.new("RGB", (24, 24)), steps=1).size == (96, 96)
    assert train_linearsr.main(["--stage", "export", "--to", "made", "--of", "pretrain", "--start", "end"]) == 0
    restorer = LinearSR.from_pretrained("made")  # nothing of the first export is left
    state, _ = tensors(first / "checkpoints" / "000003.safetensors")
    (expert,) = restorer.experts
    assert torch.equal(expert.proj_out.weight, state["dit.proj_out.weight"].float())


def test_an_export_is_as_its_training_was(run):
    run("pretrain", "--steps", 1, "--every", 1, "--suffix", "main")
    run("experts", "--steps", 1, "--every", 1, "--suffix", "none", "--boundaries", 0.5)
    assert "experts/0 was trained with --boundaries 0.5" in error_of(
        "--stage", "export", "--to", "made", "--boundaries", 0.9)
    assert "experts/0 was trained with --boundaries 0.5" in error_of(
        "--stage", "finetune", "--boundaries", 0.9, "--steps", 1, "--workers", 0)
    assert not Path("made").exists()
    assert "experts/0 was begun with --start knee" in error_of(
        "--stage", "experts", "--start", "end", "--steps", 2, "--workers", 0)
    for of, suffix in (("pretrain", "main"), ("experts", "none")):
        assert train_linearsr.main(["--stage", "export", "--to", "made", "--of", of]) == 0
        assert json.loads(Path("made/config.json").read_text())["suffix"] == suffix
    Path("runs/linearsr/pretrain").rename("elsewhere")
    line = ["--stage", "export", "--to", "made", "--of", "pretrain", "--pretrained", "elsewhere"]
    assert train_linearsr.main(line) == 0


def test_held_out_loss_falls(run):
    rows = read_log(run("pretrain", "--steps", 60, "--every", 60, "--lr", 2e-3) / "log.csv")
    assert rows[-1]["val_flow"] < 0.8 * rows[0]["val_flow"]


def test_untrained_expert_is_the_shared_network(run):
    run("pretrain", "--steps", 1, "--every", 1)
    experts = run("experts", "--steps", 1, "--every", 1, "--expert", 1)
    assert [path.name for path in experts.iterdir()] == ["1"]
    state, _ = tensors(experts / "1" / "checkpoints" / "000000.safetensors")
    assert all(x.abs().max() == 0 for key, x in state.items() if "lora_B" in key)


def test_times_are_the_steps_of_the_sampler_in_the_interval():
    u = torch.linspace(0, 0.999, 1000)
    for k, (low, high) in enumerate([(0, 0.223), (0.223, 0.875), (0.875, 0.939), (0.939, 1)]):
        ends = interval(k, (0.223, 0.875, 0.939))
        t = times(u, ends)
        assert ends == (low, high) and t.min() >= low - 1e-6 and t.max() <= high + 1e-6
        assert t.max() - t.min() > 0.99 * (high - low)
    assert interval(0, ()) == (0, 1)
    assert torch.allclose(times(u, (0.0, 1.0)), 3 * u / (1 + 2 * u))


def test_each_expert_sees_its_own_interval(run, monkeypatch):
    run("pretrain", "--steps", 1, "--every", 1)
    seen, loss = [], train_linearsr.flow_loss

    def flow_loss(network, z, t, *rest):
        if torch.is_grad_enabled():
            seen.extend(t.tolist())
        return loss(network, z, t, *rest)
    monkeypatch.setattr(train_linearsr, "flow_loss", flow_loss)
    run("experts", "--steps", 20, "--every", 20, "--expert", 2)
    assert len(seen) == 40 and 0.875 <= min(seen) < 0.885 and 0.93 < max(seen) <= 0.939
    middle = shifted((unshifted(0.875) + unshifted(0.939)) / 2)  # a batch is stratified: one time in each half
    assert all(a < middle <= b for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_the_draws_of_a_photo_cover_the_interval(monkeypatch):
    seen = []
    monkeypatch.setattr(train_linearsr, "flow_loss", lambda network, z, t, *rest: seen.append(t) or t)
    held = object.__new__(train_linearsr.Held)
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
    a, b = (torch.load(path / "state.pt", weights_only=True) for path in (a, b))
    pairs = [(a["parameters"], b["parameters"]), (a["ema"], b["ema"])]
    pairs += [([s[k] for s in a["optimizer"]["state"].values()], [s[k] for s in b["optimizer"]["state"].values()])
              for k in ("exp_avg", "exp_avg_sq")]
    return a["step"] == b["step"] and all(torch.equal(x, y) for p, q in pairs for x, y in zip(p, q, strict=True))


def columns_of(path):
    rows = read_log(path / "log.csv")
    return [{key: row[key] for key in row if key not in ("samples_per_s", "memory_gb")} for row in rows]


@pytest.mark.parametrize("stage", ["pretrain", "experts"])
def test_resumed_is_the_same_to_the_last_bit(run, stage):
    options = ["--expert", 1] if stage == "experts" else []
    if stage == "experts":
        run("pretrain", "--steps", 1, "--every", 1)
    folder = run(stage, "--steps", 4, "--every", 2, *options)
    folder = folder / "1" if stage == "experts" else folder
    folder.rename("whole")
    run(stage, "--steps", 2, "--every", 2, *options)
    run(stage, "--steps", 4, "--every", 2, *options)
    assert same_state(Path("whole"), folder)
    assert columns_of(Path("whole")) == columns_of(folder)
    for name in ("000002", "000004"):
        a, b = (tensors(f / "checkpoints" / f"{name}.safetensors")[0] for f in (Path("whole"), folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def stub(monkeypatch):
    """CUDA graphs as they behave towards their caller: fixed inputs, gradients and loss, overwritten at each replay."""
    class Stub:
        def __init__(self, owner):
            self.owner, self.grads = owner, [p.grad for p in owner.parameters]

        def replay(self):
            assert all(p.grad is grad for p, grad in zip(self.owner.parameters, self.grads, strict=True))
            self.owner.value.copy_(self.owner.eager(self.owner.inputs))
            for p, grad in zip(self.owner.parameters, self.grads, strict=True):
                p.grad = grad.copy_(p.grad)

    def capture(self, inputs):
        self.inputs, self.value = inputs, self.eager(inputs).clone()
        self.graph = Stub(self)
    monkeypatch.setattr(train_linearsr.Backward, "capture", capture)
    monkeypatch.setattr(train_linearsr, "capturable", lambda args: True)


def test_as_a_cuda_graph_it_trains_the_same(run, stub, monkeypatch):
    graphed = run("pretrain", "--steps", 5, "--every", 5)
    graphed.rename("graphed")
    with monkeypatch.context() as changed:
        changed.setattr(train_linearsr, "capturable", lambda args: False)
        rows = read_log(run("pretrain", "--steps", 5, "--every", 5) / "log.csv")
    ours = read_log(Path("graphed/log.csv"))
    assert [row["step"] for row in ours] == [0, 1, 2, 3, 4, 5]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours[1:]] == pytest.approx([row[key] for row in rows[1:]], rel=1e-4)
    run("pretrain", "--steps", 2, "--every", 2, "--name", "again")
    run("pretrain", "--steps", 5, "--every", 5, "--name", "again")
    assert same_state(Path("graphed"), Path("runs/again/pretrain"))


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


def test_a_loss_that_is_not_finite_is_not_saved(run, stub, monkeypatch):
    folder, loss = run("pretrain", "--steps", 2, "--every", 2), train_linearsr.flow_loss
    monkeypatch.setattr(train_linearsr, "flow_loss", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(SystemExit, match="step 3: loss nan"):
        train_linearsr.main(["--stage", "pretrain", "--steps", "6", "--every", "3", "--workers", "0"])
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 2


def test_without_a_graph_it_says_why_and_goes_on(capsys):
    p = torch.ones(2, requires_grad=True)

    class Fails(train_linearsr.Backward):
        def capture(self, inputs):
            raise RuntimeError("no\ngraph")
    backward = Fails(lambda x: (p * x).sum(), [p], True)
    assert [backward(torch.ones(2) * n).item() for n in (1, 2)] == [2, 4] and p.grad.tolist() == [2, 2]
    assert capsys.readouterr().out == "no CUDA graph, which makes the training slower: no graph\n"


def command(photos, model, *options):
    return [sys.executable, "-m", "linearsr.train", "--stage", "pretrain", "--data", photos, "--model", model,
            "--crop", "96", "--pairs", "6", "--val", "2", "--val-steps", "2", "--batch", "2", "--workers", "0",
            "--device", "cpu", *options]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on(photos, tiny_model, number):
    log = Path("runs/linearsr/pretrain/log.csv")
    line = command(photos, tiny_model, "--steps", "100000", "--every", "5")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end and (
                not log.exists() or len(log.read_text().splitlines()) < 15):
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    reached = torch.load("runs/linearsr/pretrain/state.pt", weights_only=True)["step"]
    if number == signal.SIGKILL:
        assert reached % 5 == 0
    else:
        assert process.returncode == 128 + number, err
        assert "the same command goes on" in out
    resumed = torch.load("runs/linearsr/pretrain/state.pt", weights_only=True)["step"] + 2
    subprocess.run(list(map(str, command(photos, tiny_model, "--steps", str(resumed), "--every", "5"))), check=True,
                   env=environment, capture_output=True)
    steps = [row["step"] for row in read_log(log)]
    assert steps == list(range(resumed + 1))  # none lost, none twice
    shutil.move("runs/linearsr/pretrain", "stopped")
    subprocess.run(list(map(str, command(photos, tiny_model, "--steps", str(resumed), "--every", "5"))), check=True,
                   env=environment, capture_output=True)
    assert same_state(Path("stopped"), Path("runs/linearsr/pretrain"))


def test_two_processes_equal_one_with_twice_the_batch(photos, tiny_model):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    one = command(photos, tiny_model, "--steps", "3", "--every", "3", "--name", "one")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
           *command(photos, tiny_model, "--steps", "3", "--every", "3", "--name", "two", "--batch", "1")[1:]]
    for line in (one, [sys.executable, *two]):
        subprocess.run(list(map(str, line)), check=True, env=environment, capture_output=True)
    one, two = (torch.load(f"runs/{name}/pretrain/state.pt", weights_only=True) for name in ("one", "two"))
    # the mean gradients: AdamW magnifies their rounding where they are near its eps
    a, b = (torch.cat([s["exp_avg"].flatten() for s in state["optimizer"]["state"].values()]) for state in (one, two))
    assert one["step"] == two["step"] == 3 and (a - b).norm() < 1e-5 * a.norm()


def test_encoded_pairs_are_made_once_and_again_where_one_is_missing(run, monkeypatch):
    monkeypatch.setattr(train_linearsr, "SHARD", 4)
    run("pretrain", "--steps", 1, "--every", 1)
    files = sorted(Path("runs/pairs").glob("*/*.safetensors"))
    assert len(files) == 2
    before = [tensors(path)[0] for path in files]
    assert before[0]["z"].shape == (4, 8, 3, 3) and before[1]["lr"].shape == (2, 3, 24, 24)
    assert before[0]["lr"].dtype == torch.uint8
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    run("pretrain", "--steps", 2, "--every", 1)
    assert files[0].stat().st_mtime_ns == stamp
    assert all(torch.equal(x, tensors(files[1])[0][key]) for key, x in before[1].items())


def test_errors(run, photos, tiny_model, tmp_path):
    assert "runs/linearsr/pretrain holds no training" in error_of(
        "--stage", "experts", "--data", photos, "--model", tiny_model, "--crop", 96, "--pairs", 4, "--workers", 0)
    run("pretrain", "--steps", 1, "--every", 1)
    assert "begun with other settings: mild 0.0, now 0.5; choose another --name" in error_of(
        "--stage", "pretrain", "--mild", 0.5, "--steps", 2, "--workers", 0)
    path = next(Path("runs/linearsr/pretrain/checkpoints").glob("*1.safetensors"))
    state, _ = tensors(path)
    log = Path("runs/linearsr/pretrain/log.csv")
    log.rename("kept")
    assert "log.csv has no validations: raise --steps" in error_of("--stage", "pretrain", "--workers", 0, "--steps", 1)
    Path("kept").rename(log)
    torch.save({"step": 0, "parameters": [], "ema": [], "optimizer": {}}, log.with_name("state.pt"))
    assert "state.pt does not fit this network" in error_of("--stage", "pretrain", "--workers", 0, "--steps", 1)
    network = train_linearsr.Network(LinearSR_dit(tiny_model, 3), train_linearsr.Stem({"width": 96}))
    with pytest.raises(ValueError, match="trained from another prior"):
        train_linearsr.load_network(network, path)


def LinearSR_dit(folder, heads):
    from sanasr import LinearDiT
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return LinearDiT(config | {"num_attention_heads": heads, "cross_attention_dim": 32 * heads})


@pytest.mark.parametrize("options, message", [
    (["--boundaries", "0.9", "0.5"], "boundaries must rise"),
    (["--steps", "0"], "--steps must be positive"),
    (["--expert", "4"], "--expert must be 0 to 3"),
    (["--mild", "2"], "--mild must lie in"),
    (["--stage", "pretrain", "--expert", "1"], "--expert and --pretrained belong to the later stages"),
])
def test_bad_options(options, message, capsys, photos):
    with pytest.raises(SystemExit):
        train_linearsr.main(["--stage", "experts", "--data", str(photos), *options])
    assert message in capsys.readouterr().err


# --- lab/linearsr.py ---


def test_lab_measures_losses_and_makes_the_table(run, photos, tiny_model, tmp_path, capsys):
    pretrained = run("pretrain", "--steps", 1, "--every", 1)
    run("experts", "--steps", 1, "--every", 1, "--start", "end")
    assert train_linearsr.main(["--stage", "export", "--to", "made", "--start", "end"]) == 0
    capsys.readouterr()
    (Path("made") / "transformer" / "config.json").write_text(
        (Path("made") / "transformer" / "config.json").read_text().replace('"sample_size": 4', '"sample_size": 3'))
    common = ["--model", "made", "--device", "cpu"]
    assert lab.main(["losses", *common, "--data", str(photos), "--draws", "2", "--val", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line[:14] for line in lines] == ["0.000 to 0.223", "0.223 to 0.875", "0.875 to 0.939", "0.939 to 1.000"]
    assert all(float(value) > 0 for line in lines for value in line.split()[3:6])

    for kind, side in (("lr", 32), ("hr", 128)):
        Path(kind).mkdir()
        Image.open(photos / "0.png").convert("RGB").resize((side, side)).save(f"{kind}/a.png")
    line = ["table", *common, "--lr", "lr", "--hr", "hr", "--sanasr", str(tiny_model), "--metrics", "psnr,lpips",
            "--pretrained", str(pretrained), "--steps", "2", "--every", "1", "--only"]
    rows = Path("runs/lab-linearsr/rows")
    assert lab.main([*line, "bicubic", "sana-sr", "steps-1-0"]) == 0
    stamp = (rows / "sana-sr.csv").stat().st_mtime_ns
    made = ["models", "--pretrained", str(pretrained), "--steps", "2", "--every", "1", "--device", "cpu",
            "--options", "--lr 1e-3 --batch 1"]
    assert lab.main([*made, "--only", "two-1"]) == 0
    note = json.loads(Path("runs/lab-linearsr/two-1/experts/1/settings.json").read_text())["settings"]
    assert note["lr"] == 1e-3 and note["batch"] == 1
    config = json.loads(Path("runs/lab-linearsr/models/two-1/config.json").read_text())
    assert config["_provenance"]["steps"] == [1, 1], "the end, wherever the knee is"
    with pytest.raises(SystemExit, match="no model fine-0; there are pretrained-0"):  # without --best
        lab.main([*made, "--only", "fine-0"])
    shutil.rmtree("runs/lab-linearsr/two-1")  # as if trained on another machine
    assert lab.main([*line, "bicubic", "sana-sr", "steps-1-0", "steps-2-0", "two-1"]) == 0
    assert (rows / "sana-sr.csv").stat().st_mtime_ns == stamp
    table = capsys.readouterr().out
    assert "LinearSR, 2 steps, seed 0" in table and "two experts, seed 1" in table and "GMAC" in table
    assert LinearSR.from_pretrained("runs/lab-linearsr/models/two-1").boundaries == (0.875,)
    assert not Path("runs/lab-linearsr/two-1").exists()
    assert Image.open("runs/lab-linearsr/tradeoff.png").size == (640, 480)
    with pytest.raises(SystemExit, match="no row steps-3-0"):
        lab.main([*line, "steps-3-0"])
    with pytest.raises(SystemExit, match=r"two-1: its experts have \[1, 1\] steps, not 4 each"):
        lab.main([*made, "--steps", "8", "--only", "two-1"])
    assert lab.main([*line, "bicubic", "--metrics", "psnr", "--out", "other"]) == 0  # without LPIPS: no drawing
    assert lab.main([*made, "--only", "pretrained-0"]) == 0
    assert len(LinearSR.from_pretrained("runs/lab-linearsr/models/pretrained-0").experts) == 1


def test_bootstrap_holds_the_mean():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).numpy()
    low, high = lab.bootstrap(x)
    assert low < x.mean() < high and 0.13 < high - low < 0.23  # 2 · 1.96 / √500 = 0.175
