"""The autoencoder's training: its pairs, its views, its loss, and a run of the tiny model that resumes."""
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import noise, relative
from PIL import Image

import autoencoder
import train
from photos import kinds
from photos.degrade import enlarge, to_tensor
from runs import read_log
from sanasr import DCAE, SanaSR, build_prompt, one_step


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of 288 pixels, smooth and with edges."""
    folder = tmp_path_factory.mktemp("hq")
    for i in range(3):
        rgb = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(rgb).resize((288, 288), Image.NEAREST if i else Image.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def dists():
    """DISTS has random weights instead of VGG16's."""
    found = autoencoder.DISTS().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder.DISTS, "from_pretrained", lambda: found)
        yield


@pytest.fixture
def net(tiny_model):
    return DCAE.from_pretrained(tiny_model / "vae", torch.float32)


def restoration(net, **changes):
    """The loss, by default of L1, the lattice and the drift alone."""
    args = dict(texture=0, latent=False, adapter=None, perceptual=0, device=torch.device("cpu"), dtype="fp32")
    return autoencoder.Restoration(SimpleNamespace(**args | changes), net)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_pairs_of_every_kind_are_of_one_place(kind, photos):
    image = Image.open(photos / "0.png")
    for seed in range(3):
        hr, lr = kinds.make_pair(image, kind, np.random.default_rng(seed))
        assert hr.size == (256, 256) and lr.size == (64, 64)
        error = (enlarge(lr) - (to_tensor(hr) * 2 - 1)).abs().mean()
        assert error < (0.25 if kind == "strong" else 0.08), "neither shifted nor of another place"
        again = kinds.make_pair(image, kind, np.random.default_rng(seed))
        assert (hr.tobytes(), lr.tobytes()) == tuple(x.tobytes() for x in again)


@pytest.fixture
def run(here, monkeypatch, photos, tiny_model):
    """run(name, options…) trains the tiny model's autoencoder and returns the run's folder."""
    monkeypatch.setattr(autoencoder, "HELD", 8)

    def start(name, *options, code=0):
        argv = ["--learn", "autoencoder", "--data", photos, "--model", tiny_model, "--name", name, "--pairs", 12,
                "--batch", 2, "--workers", 0, "--every", 2, *options]
        assert train.main([str(a) for a in argv]) == code
        return here / "runs" / name
    return start


def test_views_take_what_the_teacher_made(run, tmp_path):
    run("r", "--steps", 1)
    folder = next((tmp_path / "runs" / "pairs").iterdir())
    names = sorted(p.name for p in (folder / "lr").iterdir())
    assert len(names) == 12
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in names[:6]:
        Image.new("RGB", (256, 256), (255, 0, 0)).save(teacher / name)
    views = autoencoder.Views(folder, names, teacher, 0, 1 / 8, real=True)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 224, 224)
    seen = [views[n] for n in range(40)]
    for view in seen:
        clean = torch.equal(view["x_L"], view["x_H"])
        assert torch.equal(view["x_H"], red) == (not clean and view["name"] in names[:6])
        assert not torch.equal(view["real"], red), "the critic's real pictures are photos"
        assert view["seen"] == torch.equal(view["x_H"], red)
    assert 0 < sum(torch.equal(v["x_L"], v["x_H"]) for v in seen) < 15
    assert torch.equal(views[7]["x_L"], seen[7]["x_L"])
    assert not seen[39]["late"] and views[autoencoder.ALONE]["late"]


@pytest.mark.parametrize("texture", [0, 1])
def test_training_lowers_the_loss_and_resumes(run, monkeypatch, texture):
    options = ["--steps", 4 if texture else 8, "--every", 4, "--lr", "2e-3", "--texture", texture]
    whole = run("whole", *options)
    rows = read_log(whole / "log.csv")
    assert texture or rows[-1]["val_psnr"] > rows[0]["val_psnr"], "on held-out pairs, from seeded weights"
    loss, calls = autoencoder.Restoration.__call__, []
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.Restoration, "__call__", lambda self, batch: (
            calls.append(1), len(calls) == 3 and signal.raise_signal(signal.SIGTERM), loss(self, batch))[-1])
        again = run("again", *options, code=143)
    assert train.main(["--name", "again", "--resume"]) == 0
    a, b = ((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in (whole, again))
    assert a == b, "a resumed run is one that was not interrupted"
    losses = [[row["loss"] for row in read_log(f / "log.csv")[1:]] for f in (whole, again)]
    assert losses[0] == losses[1], "with texture the critic's among them"
    with pytest.raises(SystemExit, match=r"--perceptual 0.5 \(was 0.1\)"):
        train.main(["--name", "whole", "--resume", "--perceptual", "0.5"])


def test_drift_is_measured_from_the_first_encoder(net):
    loss, (x_l, x_h) = restoration(net, latent=True), noise(2, 2, 3, 64, 64).float()
    z_l, z_h = net.encode(x_l).detach(), net.encode(x_h).detach()
    assert loss.drift(z_h, x_h).item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        net.encoder.conv_out.weight.zero_()
        net.encoder.conv_out.bias.zero_()
        z_l = net.encode(x_l)
    value = loss({"x_L": x_l, "x_H": x_h, "clean": torch.tensor([False, False])})["loss"]
    assert value.item() == pytest.approx(((z_l - z_h).square().sum() / z_h.square().sum()).item(), rel=1e-5)


def test_the_loss_holds_clean_latents_and_hears_the_critic_late(net):
    """Drift counts for the clean views alone, doubt once the critic has learnt alone."""
    loss, x = restoration(net), noise(2, 3, 224, 224).float().clamp(-1, 1)
    z0 = net.encode(x)[0].detach()
    with torch.no_grad():
        net.encoder.conv_out.weight.mul_(1.1)
        drift = (net.encode(x)[0] - z0).square().sum() / z0.square().sum()
    batch = {"x_L": x, "x_H": x, "real": x, "clean": torch.tensor([True, False]), "shift": torch.tensor([[0, 0]] * 2)}
    terms = loss(batch)
    lattice = autoencoder.REPEATED * autoencoder.repeated(net.decode(net.encode(x)).detach() - x)
    assert (terms["loss"] - terms["l1"] - lattice).item() == pytest.approx(autoencoder.DRIFT * drift.item(), rel=1e-2)
    texture = restoration(net, texture=2)
    texture.critic.eval()
    early, late = (texture(batch | {"late": torch.tensor([True, both])}) for both in (False, True))
    heard = (late["loss"] - early["loss"]).item()
    assert heard == pytest.approx(2 * autoencoder.DOUBT * late["doubt"].item(), rel=1e-3)


def test_lpips_counts_for_what_the_teacher_made(net):
    loss, (x, x_h) = restoration(net, perceptual=2), noise(2, 2, 3, 96, 96).float().clamp(-1, 1)
    batch = {"x_L": x, "x_H": x_h, "clean": torch.tensor([False] * 2), "shift": torch.tensor([[3, 5]] * 2)}
    for seen in ([True, True], [False, True], [False, False]):
        with torch.no_grad():
            each = loss.judge(net.decode(net.encode(x))[:, :, 3:, 5:].clamp(-1, 1), x_h[:, :, 3:, 5:])
        value = loss(batch | {"seen": torch.tensor(seen)})["lpips"].item()
        assert value == pytest.approx((each * torch.tensor(seen)).mean().item(), rel=1e-4)


def test_the_critic_sees_what_is_real():
    """Its verdicts part the real from the rest within some steps."""
    torch.manual_seed(0)
    critic = autoencoder.Critic()
    taps = [[torch.randn(2, c, 8, 8).relu() + offset for c in (64, 128, 256)] for offset in (0.0, 1.0)]
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = autoencoder.doubt(critic(taps[0]), critic(taps[1]))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_texture_moves_the_picture_and_the_critic_apart():
    """DISTS and doubt pull on x alone, the critic's own loss on the critic alone; equal pictures have no distance."""
    torch.manual_seed(0)
    loss, x_h = restoration(None, texture=1), noise(2, 3, 224, 224).float().clamp(-1, 1)
    x, shift = (x_h / 2).requires_grad_(), torch.tensor([3, 30])
    assert loss.texture(x_h, x_h, shift)[0].item() == pytest.approx(0, abs=1e-5)
    dists, doubt, verdict = loss.texture(x, x_h, shift)
    for term in (dists, doubt):
        gradient, = torch.autograd.grad(term, x, retain_graph=True)
        assert gradient[1].abs().max() > 0 and not gradient[0].any(), "of half of the views"
    own = torch.autograd.grad(verdict, [x, *loss.critic.parameters()], allow_unused=True)
    assert own[0] is None and all(g.abs().max() > 0 for g in own[1:] if g.ndim > 1)


def learnt(*folders):
    """The halves of the autoencoder that differ."""
    before, after = (DCAE.from_pretrained(f / "vae", torch.float16).state_dict() for f in folders)
    return {key.split(".")[0] for key, x in before.items() if not torch.equal(x, after[key])}


@pytest.mark.parametrize("part, options, terms", [
    ("decoder", ["--texture", 1], {"l1", "lpips", "dists", "doubt", "critic"}), ("encoder", ["--latent"], {"drift"})])
def test_one_half_alone_learns(run, tiny_model, part, options, terms):
    folder = run(part, "--steps", 3, *options)
    columns = {*read_log(folder / "log.csv")[-1]}
    assert learnt(tiny_model, folder) == {part}
    assert {"l1", "lpips", "dists", "doubt", "critic", "drift"} & columns == terms


def test_the_decoder_sees_what_the_adapter_makes(run, tiny_model, tmp_path):
    """D(ẑ) of the training is that of `SanaSR.restore`'s networks; clean views stay E(x_H)."""
    adapter = tiny.tiny_adapter(tmp_path / "a.safetensors", tiny_model, 2, gain=1)
    model, x = SanaSR.from_pretrained(tiny_model, adapter=adapter), noise(2, 3, 64, 64).float().clamp(-1, 1)
    loss = restoration(model.vae, texture=1, model=tiny_model, adapter=adapter)
    z = model.vae.encode(x)
    c, m = model.encode_prompt(build_prompt(""))
    z_hat = one_step(model.dit, z[:1] * model.scaling_factor, torch.tensor([900.0]), c, m) / model.scaling_factor
    assert relative(loss.encode(x, torch.tensor([False, True])), torch.cat([z_hat, z[1:]])) < 1e-4
    assert relative(z_hat, z[:1]) > 0.1
    assert learnt(tiny_model, run("d", "--adapter", adapter, "--steps", 2)) == {"decoder"}


@pytest.mark.parametrize("options, message", [
    ("--latent --texture 1", "--latent: the encoder alone learns"),
    ("--dtype fp16", "--dtype fp16: gradients here lie below its range"),
    ("--teacher .", "--teacher .* holds no picture of a name as in runs/pairs/"),
    ("--teacher teacher", "_[a-z]*.png is 128×128; a teacher's picture is 256×256")])
def test_what_cannot_be_learned_from_is_refused(run, here, options, message):
    (here / "teacher").mkdir()
    for n in range(12):
        for kind in kinds.KINDS:
            Image.new("RGB", (128, 128)).save(here / "teacher" / f"{n:06d}_{kind}.png")
    with pytest.raises(SystemExit, match=message):
        run("none", "--steps", 1, *options.split())


def test_a_run_holds_to_the_autoencoder_that_it_began_with(run):
    first = run("first", "--steps", 1)
    run("second", "--steps", 1, "--init", first / "vae")
    with pytest.raises(SystemExit, match="--select: runs/first is of --learn autoencoder"):
        train.main(["--name", "first", "--select", "psnr"])
    (first / "vae" / "more").touch()
    with pytest.raises(SystemExit, match="the first autoencoder changed"):
        train.main(["--name", "second", "--resume", "--steps", "2"])


def test_pairs_survive_a_worker_that_is_killed(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "make_pair", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(SystemExit, match="^error: a process that makes pairs was killed"):
            run("r", "--steps", 1)
    run("r", "--steps", 1)


def test_repeated_sees_a_lattice():
    plain = 0.1 * noise(1, 3, 64, 64)
    dots = plain.clone()
    dots[:, :, ::8, ::8] += 0.5
    assert autoencoder.repeated(dots) > 2 * autoencoder.repeated(plain)
