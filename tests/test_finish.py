"""The last stages of the bundled model's training, on a tiny model and noise: what moves, what stays, what repeats."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import weights
from lab import finish, pretrain
from metrics.perceptual import VGG16
from photos import degrade
from photos.pairs import held_out
from sanasr import DCAE, SanaSR, inject_lora, load_lora, lora_parameters, one_step, open_weights, save_lora


@pytest.fixture
def run(tmp_path, tiny_model):
    """finish.main with a tiny model and a folder of 20 photos; returns what it leaves under `out`."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "hq").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        small = Image.fromarray(rng.integers(0, 256, (20, 21, 3), np.uint8))
        small.resize((336, 320), Image.Resampling.BICUBIC).save(tmp_path / "hq" / f"{i}.webp", lossless=True)

    def main(stage, *options):
        finish.main([stage, "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--device", "cpu",
                     "--rank", "2", "--batch", "2", *map(str, options)])
        return tmp_path / "out"
    return main


@pytest.fixture
def pairs(run, tmp_path, monkeypatch):
    """Four training and four held-out pairs, whose teacher's pictures are x_H."""
    monkeypatch.setattr(finish, "VAL_PAIRS", 4)
    out = run("pairs", "--data", tmp_path / "hq", "--count", 4)
    for part in ("train", "val"):
        shutil.copytree(out / "pairs" / part / "hr", out / "pairs" / part / "teacher")
    return out


def test_pairs_repeat_grow_and_keep_held_out_photos_apart(run, pairs, tmp_path):
    first = {p: p.read_bytes() for p in pairs.rglob("train/[lh]r/*.png")}
    assert len(first) == 8
    run("pairs", "--data", tmp_path / "hq", "--count", 6)
    assert len(list(pairs.rglob("train/lr/*.png"))) == 6 and all(p.read_bytes() == x for p, x in first.items())
    photos = {weights.sha256(p): np.asarray(Image.open(p).convert("RGB")) for p in (tmp_path / "hq").iterdir()}
    held = held_out(photos)

    def source(crop):  # the photo that a crop comes from: its rows are found there
        return {sha for sha, x in photos.items() for left in range(x.shape[1] - 319)
                if np.array_equal(x[:, left:left + 320], crop)}
    for part in ("train", "val"):
        for path in (pairs / "pairs" / part / "hr").glob("*.png"):
            found = source(np.asarray(Image.open(path)))
            assert found and (found <= held) == (part == "val")


def test_the_update_is_eq_4_and_a_lower_rank_starts_a_higher_one(tmp_path, tiny_model):
    model = SanaSR.from_pretrained(tiny_model, adapter=False)
    torch.manual_seed(0)
    inject_lora(model.dit, 2, targets="attn+ffn")
    with torch.no_grad():
        for p in lora_parameters(model.dit).values():
            p.normal_(std=0.1)
    z, c, m = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 32), torch.ones(2, 5)
    expected = one_step(model.dit, z, torch.full((2,), finish.TAU), c, m)
    torch.testing.assert_close(finish.update(model.dit, z, c, m), expected, rtol=1e-4, atol=1e-5)
    save_lora(model.dit, tmp_path / "low.safetensors")
    args = finish.parse(["adapter", "--model", str(tiny_model), "--rank", "5", "--device", "cpu",
                         "--out", str(tmp_path)])
    higher = finish.open_adapted(args, tmp_path / "low.safetensors")
    torch.testing.assert_close(finish.update(higher.dit, z, c, m), expected, rtol=1e-4, atol=1e-5)
    attention = SanaSR.from_pretrained(tiny_model, adapter=False)
    inject_lora(attention.dit, 2, targets="attn")
    with torch.no_grad():
        for p in lora_parameters(attention.dit).values():
            p.normal_(std=0.1)
    save_lora(attention.dit, tmp_path / "attention.safetensors")
    wider = finish.open_adapted(args, tmp_path / "attention.safetensors")
    expected = one_step(attention.dit, z, torch.full((2,), finish.TAU), c, m)
    torch.testing.assert_close(finish.update(wider.dit, z, c, m), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_dists(monkeypatch):
    """DISTS of a VGG16 of few channels, since the real one is a download."""
    monkeypatch.setattr(VGG16, "channels", (2, 3, 4, 5, 6))
    monkeypatch.setattr(finish.DISTS, "from_pretrained", lambda: finish.DISTS().requires_grad_(False))


def test_the_stages_move_what_they_say_and_the_export_loads(run, pairs, small_dists, tmp_path, capsys):
    before = {part: getattr(SanaSR.from_pretrained(tmp_path / "model"), part).state_dict() for part in ("vae", "dit")}
    out = run("adapter", "--steps", 1, "--validate-every", 1)
    views = torch.load(out / "views_train_teacher.pt", weights_only=True)
    (out / "adapter.pt").unlink()
    run("encoder", "--steps", 2, "--validate-every", 1, "--drawn", 0.5, "--jpeg", 1)
    vae = DCAE.from_pretrained(out / "vae").state_dict()
    assert {k.split(".")[0] for k in vae if not torch.equal(vae[k], before["vae"][k].half())} == {"encoder"}
    run("adapter", "--steps", 2, "--validate-every", 1)
    again = torch.load(out / "views_train_teacher.pt", weights_only=True)
    assert len(views["where"]) == 16 and views["where"] == again["where"]
    assert not torch.equal(views["z"][0], again["z"][0])  # by the encoder of OUT
    run("compare")  # of the model as it is
    first = capsys.readouterr().out
    run("decoder", "--steps", 3, "--validate-every", 3, "--mild", 0.7, "--dists", "--gan", 0.3, "--encoder")
    run("compare")
    second = capsys.readouterr().out
    assert "as it is" in first and "finish: 3 steps" in second
    assert first.count("D(ẑ) − D(z_L)") == second.count("D(ẑ) − D(z_L)") == 2 and first != second
    run("control", "--steps", 3, "--validate-every", 3, "--dists", "--gan", 0.3)
    run("compare")
    text = capsys.readouterr().out
    assert "strong, 2 pairs: D(ẑ)" in text and text.count("D(ẑ) − control") == 2
    trained = {name: torch.load(out / f"{name}.pt", weights_only=True)["model"] for name in ("finish", "control")}
    for name, state in trained.items():
        moved = {k for k, x in state.items() if k in vae and not torch.equal(x.half(), vae[k])}
        assert {k for k in state if k.startswith("decoder.")} == {k for k in vae if k.startswith("decoder.")}
        assert any(k.startswith("critic.") for k in state)
        assert {k.split(".")[0] for k in moved} == {"decoder", *["encoder"] * (name == "finish")}
        with open_weights(out / "adapter.safetensors") as file:
            lora = {k: file.get_tensor(k) for k in file.keys()}
        assert {k for k in state if ".lora_" in k} == {f"dit.{k}" for k in lora if name == "finish"}
        assert name == "control" or any(not torch.equal(state[f"dit.{k}"], x) for k, x in lora.items())
    run("export", "--share", 0.5)
    half = load_file(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    ema = torch.load(out / "finish.pt", weights_only=True)["ema"]
    means = {k: torch.lerp(x.float(), ema[k], 0.5).half() if k in ema else x for k, x in vae.items()}
    assert all(torch.equal(half[k], x) for k, x in means.items())
    run("export")
    model = SanaSR.from_pretrained(tmp_path / "model", merge=False)
    after = model.vae.state_dict()
    assert all(torch.equal(x, ema[k].half().float()) for k, x in after.items())
    assert all(torch.equal(x, ema[f"dit.{k}"].half().float()) for k, x in lora_parameters(model.dit).items())
    assert load_lora(model.dit, tmp_path / "model" / "adapter.safetensors")["timestep"] == "900.0"
    assert json.loads((tmp_path / "model" / "provenance.json").read_text())["adapter and decoder in one"]["steps"] == 3


def test_blurred_is_what_pillow_makes_of_a_blurred_and_reduced_picture():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8))
    image = small.resize((96, 108), Image.Resampling.BICUBIC)
    x = degrade.to_tensor(image)
    for sigma in (0.5, 2.5):
        at = torch.arange(-16.0, 17)
        kernel = torch.exp(-0.5 * (at / sigma) ** 2)
        kernel = kernel[:, None] * kernel / kernel.sum() ** 2
        expected = degrade.enlarge(torch.nn.functional.avg_pool2d(degrade.blur(x, kernel), 4))
        got = finish.blurred(torch.stack([x, x]) * 2 - 1, [sigma, 1.0])[0]
        levels = (got - expected).abs() * 127.5  # Pillow rounds between its two passes
        assert levels.max() < 1.1 and levels.mean() < 0.3


def test_blurred_compresses_the_reduced_picture():
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, packed = finish.blurred(x, [1.0, 1.0]), finish.blurred(x, [1.0, 1.0], [0, 40])
    assert torch.equal(plain[0], packed[0])
    kernel = degrade.gaussian_kernel(33, 1.0, 1.0, 0.0)
    small = torch.nn.functional.avg_pool2d(degrade.blur(x[1], kernel), 4) / 2 + 0.5
    levels = (packed[1] - degrade.enlarge(degrade.jpeg(small, 40))).abs() * 127.5
    assert levels.mean() < 1 < (packed[1] - plain[1]).abs().mean() * 127.5


def test_drawn_has_few_colours_hard_edges_and_is_the_same_for_the_same_seed():
    x = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.nn.functional.interpolate(x[None], (96, 96), mode="bicubic")[0].clamp(-1, 1)
    for seed in range(8):
        y = finish.drawn(x, np.random.default_rng(seed))
        assert y.shape == x.shape and y.abs().max() <= 1
        assert torch.equal(y, finish.drawn(x, np.random.default_rng(seed)))
        step = y.diff().abs().amax(0)
        assert (step == 0).float().mean() > 0.5 > 0.02 > (x.diff().abs().amax(0) == 0).float().mean()
        assert step.max() > 0.4 > x.diff().abs().max()


def test_frozen_the_decoder_stays_and_the_adapter_moves(run, pairs):
    out = run("decoder", "--freeze", "--no-teacher", "--plain", 1, "--soft", 0.5, "--jpeg", 0.5, "--drawn", 0.5,
              "--steps", 2, "--validate-every", 2)
    after = torch.load(out / "finish.pt", weights_only=True)["model"]
    args = finish.parse(["decoder", "--model", str(out.parent / "model"), "--rank", "2", "--device", "cpu"])
    before = finish.Restorer(finish.open_restorer(args), True).state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if ".lora_" in k}


def test_a_critic_goes_on_and_other_states_are_refused(run, pairs, small_dists, tmp_path):
    options = "--no-teacher", "--dists", "--gan", 0.3, "--steps", 1, "--validate-every", 1
    first = run("decoder", *options).joinpath("finish.pt").rename(tmp_path / "first.pt")
    out = run("decoder", *options, "--critic", first, "--seed", 1, "--lr", 1e-12)
    before, after = (torch.load(path, weights_only=True)["model"] for path in (first, out / "finish.pt"))
    critic = [key for key in before if key.startswith("critic.") and key.endswith(("original", "bias"))]
    assert critic and all(torch.allclose(before[key], after[key], atol=1e-8) for key in critic)
    (out / "finish.pt").unlink()
    for state in {}, dict(model={}), dict(model={k: x for k, x in before.items() if k != critic[0]}):
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(SystemExit, match="other.pt has no critic of this kind: give a finish.pt that --gan made"):
            run("decoder", *options, "--critic", tmp_path / "other.pt")


def test_softened_keeps_the_place_and_takes_the_detail():
    torch.manual_seed(0)
    x = torch.rand(3, 64, 64) * 2 - 1
    assert torch.allclose(finish.softened(x, 1.0), x, atol=1.01 / 255)
    y = finish.softened(x, 2.0)
    assert y.shape == x.shape and y.diff().abs().mean() < 0.7 * x.diff().abs().mean()
    flat = torch.linspace(-0.5, 0.5, 64).expand(3, 64, 64)
    assert torch.allclose(finish.softened(flat, 2.0)[:, :, 8:-8], torch.linspace(-0.5, 0, 64)[8:-8], atol=0.02)


def test_flatness_is_one_half_where_the_texture_has_four_grey_levels():
    checker = torch.ones(12, 12)
    checker[::2, ::2] = checker[1::2, 1::2] = -1
    x = (checker * torch.tensor([0, 4, 400]).view(3, 1, 1, 1) / 127.5).expand(3, 3, 12, 12)
    flat = finish.flatness(x)[:, 0, 6, 6]
    torch.testing.assert_close(flat, torch.tensor([1, 0.5, 1e-4]), rtol=0.01, atol=1e-6)


def test_repeated_sees_lattices_of_up_to_8_pixels_and_little_else():
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 64, 64)
    assert finish.repeated(torch.full((1, 3, 64, 64), 0.5)).item() < 2e-3  # a shift of brightness is no lattice
    for period in (2, 4, 8):
        cell = torch.randn(2, 3, period, period)
        cell -= cell.mean((2, 3), keepdim=True)
        tiled = cell.repeat(1, 1, 64 // period, 64 // period)
        torch.testing.assert_close(finish.repeated(tiled), cell.square().mean((1, 2, 3)).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(finish.repeated(noise), torch.full((2,), 0.25), rtol=0.1, atol=0)  # of 16 cells' mean


def test_balanced_gives_every_loss_and_picture_the_same_say():
    torch.manual_seed(0)
    y = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    one, other = y.square().sum((1, 2, 3)), (y * torch.tensor([1e-3, 1, 1e3]).view(3, 1, 1, 1)).abs().sum((1, 2, 3))
    g = finish.balanced([(1, one)], y)
    torch.testing.assert_close(g.flatten(1).norm(dim=1), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(g * 3, y / y.flatten(1).norm(dim=1).view(3, 1, 1, 1))
    torch.testing.assert_close(finish.balanced([(1, one), (0.5, other)], y) - g, finish.balanced([(0.5, 7 * other)], y))


def test_a_critic_doubts_a_blurred_view_of_what_it_has_never_seen(small_dists):
    torch.manual_seed(0)
    dists, critic = finish.DISTS.from_pretrained(), finish.Critic(8)
    optimizer = torch.optim.Adam(critic.parameters(), 5e-3)

    def verdicts():
        sharp = torch.rand(4, 3, 32, 32)
        blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
        blurred += sharp.mean((2, 3), keepdim=True) - blurred.mean((2, 3), keepdim=True)
        return [critic(dists.taps(x)) for x in (blurred, sharp)]
    for _ in range(60):
        loss = finish.doubt(*verdicts()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    blurred, sharp = verdicts()
    assert (finish.doubt(blurred, sharp) + 0.2 < finish.doubt(sharp, blurred)).all()
    torch.testing.assert_close(finish.doubt(sharp, sharp), torch.full((4,), 4 * np.log(2)).float())


def test_fit_gives_a_child_the_rate_it_is_named_with(tmp_path):
    model = torch.nn.ModuleDict(dict(a=torch.nn.Linear(1, 1, False), critic=torch.nn.Linear(1, 1, False)))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    args = finish.parse(["decoder", "--out", str(tmp_path), "--device", "cpu"])
    pretrain.fit("x", model, lambda model, step: (sum(p.sum() for p in model.parameters()), {}), lambda _: {}, args, 1,
                 0.2, weight_decay=0.0, factors=dict(critic=8))
    moved = {key: (before[key] - x).item() for key, x in model.state_dict().items()}
    assert moved == pytest.approx({"a.weight": 0.2 / 200, "critic.weight": 8 * 0.2 / 200}, rel=1e-3)


def test_a_stage_that_lacks_its_input_says_what_to_do(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no pictures; run the stage `pairs`, then any restorer"):
        run("adapter", "--steps", 1)
    for kind, side in (("hr", 320), ("lr", 64)):
        (tmp_path / "out/pairs/train" / kind).mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / "out/pairs/train" / kind / "0_mild.png")
    with pytest.raises(SystemExit, match="train/lr/0_mild.png is RGB, 64×64: .* LR pictures of 80"):
        run("decoder", "--no-teacher", "--steps", 1)
    for options, message in ((("pairs",), "--data is needed"), (("decoder", "--gan", 0.3), "give --dists, too"),
                             (("decoder", "--critic", "finish.pt"), "the weight of its verdict"),
                             (("encoder", "--drawn", 0.4), "the share of compressed views")):
        with pytest.raises(SystemExit):
            run(*options)
        assert message in capsys.readouterr().err
