"""LinearSR: the sampler on a distribution whose velocity is known, the experts' intervals, the restorer."""
import copy
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, noise, photo
from PIL import Image, ImageFilter
from seeded import seeded_input, seeded_module

import eval as evaluator
import fast
import lab.profile
import linearsr
from linearsr import BOUNDARIES, LinearSR, Stem, expert_of, sample
from metrics import LPIPS
from photos.degrade import to_tensor
from photos.pictures import bicubic
from sanasr import LinearDiT, PromptEncoder, SanaSR
from weights.files import save_module

STEM = {"channels": [8, 16, 24], "width": 64}

# --- the sampler, on a Gaussian mixture ---

WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-2.0, 1.0], [1.5, 0.5]]).double(), 0.3


def mixture_velocity(z, t):
    """E[ε − x_0 | z_t = z] for x_0 of the mixture Σ w_i N(μ_i, s²): z is n,2."""
    a, variance = 1 - t, (1 - t) ** 2 * STD ** 2 + t ** 2
    offset = z[:, None] - a * MEANS  # n,i,2
    chance = (WEIGHTS.log() - offset.square().sum(2) / (2 * variance)).softmax(1)
    x_0 = (chance[:, :, None] * (MEANS + a * STD ** 2 / variance * offset)).sum(1)
    return (z - x_0) / t  # ε = (z − (1 − t) x_0) / t


def test_sampler_reaches_the_moments():
    x = sample(mixture_velocity, noise(20_000, 2), 200)
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    covariance = (WEIGHTS[:, None, None] * centred[:, :, None] * centred[:, None]).sum(0) + STD ** 2 * torch.eye(2)
    assert (x.mean(0) - mean).abs().max() < 0.03
    assert (torch.cov(x.T) - covariance).abs().max() < 0.06
    nearest = torch.cdist(x, MEANS).argmin(1)
    assert abs((nearest == 0).double().mean() - 0.3) < 0.015


def test_one_step_gives_the_mean():
    z = noise(100, 2)  # at t = 1 nothing is known of x_0
    assert torch.allclose(sample(mixture_velocity, z, 1), (WEIGHTS @ MEANS).expand(100, 2))
    for steps in (0, -3):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            sample(mixture_velocity, z, steps)


# --- intervals of t ---

def test_boundaries_send_each_t_to_its_expert():
    assert BOUNDARIES == (0.223, 0.875, 0.939)
    inside = {0.0: 0, 0.1: 0, 0.5: 1, 0.9: 2, 0.95: 3, 1.0: 3}
    upper_ends = {0.223: 0, 0.875: 1, 0.939: 2}  # an interval includes its upper end
    just_above = {np.nextafter(b, 1): k + 1 for b, k in upper_ends.items()}
    for t, k in {**inside, **upper_ends, **just_above}.items():
        assert expert_of(t) == k, t
    assert expert_of(0.0, ()) == expert_of(1.0, ()) == 0
    for wrong in ([0.9, 0.5], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [0.5, float("nan")], ["x"], 3):
        with pytest.raises(ValueError, match="boundaries must"):
            linearsr.check_boundaries(wrong)


# --- the network ---

@pytest.fixture(scope="module")
def stem():
    """A trained-looking one."""
    return seeded_module(Stem(STEM))


LR = seeded_input("lr", (2, 3, 32, 40))


def inputs(dtype=torch.float32):
    return (seeded_input("z", (2, 8, 4, 5)).to(dtype), torch.tensor([900.0, 13.0]),
            seeded_input("c", (2, 6, 32)).to(dtype), torch.ones(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_network_is_the_prior_to_the_last_bit(sana, dtype):
    dit, stem = copy.deepcopy(sana.dit).to(dtype), Stem(STEM).to(dtype)
    with torch.no_grad():  # where gradients flow, attention rounds otherwise in bf16
        assert torch.equal(dit(*inputs(dtype), stem(LR.to(dtype))), dit(*inputs(dtype)))
    dit(*inputs(dtype), stem(LR.to(dtype))).square().sum().backward()
    assert stem.proj.weight.grad.abs().max() > 0, "the new input channels learn at once"


def test_stem_and_embedding_are_one_layer_on_the_concatenation(sana, stem):
    (z, t, c, m), dit = inputs(), sana.dit
    whole = LinearDiT(dit.config | {"in_channels": 8 + 24, "out_channels": 8})
    state = dit.state_dict()
    state["patch_embed.proj.weight"] = torch.cat([state["patch_embed.proj.weight"], stem.proj.weight], 1)
    whole.load_state_dict(state)
    features = LR
    for conv in stem.convs:
        features = torch.nn.functional.silu(conv(features))
    assert features.shape == (2, 24, 4, 5)
    expected = whole(torch.cat([z, features], 1), t, c, m)
    assert torch.allclose(dit(z, t, c, m, stem(LR)), expected, atol=1e-5)
    assert not torch.allclose(dit(z, t, c, m), expected, atol=1e-2)


# --- the restorer ---

PHOTO = photo(24, 16)


@pytest.fixture
def make(sana, stem):
    """make(number of experts, …) -> a LinearSR whose experts are copies of one network."""
    def make(experts=1, **options):
        return LinearSR([copy.deepcopy(sana.dit) for _ in range(experts)], stem, sana.vae, sana.prompts, **options)
    return make


@pytest.mark.parametrize("scale, k", [(1, 4), (2, 2), (4, 1)])
def test_odd_sides_are_padded_not_stretched(make, scale, k):
    restorer, image = make(), photo(21, 13)
    x = np.pad(np.array(image), ((0, -13 % k), (0, -21 % k), (0, 0)), "edge")
    whole = restorer.restore(Image.fromarray(x), scale=scale, steps=1)
    assert restorer.restore(image, scale=scale, steps=1) == whole.crop((0, 0, 21 * scale, 13 * scale))
    assert list(restorer.stages) == ["text", "stem", "dit", "decode"]


def test_restore_is_a_function_of_the_seed(make):
    restorer = make(4)
    first = restorer.restore(PHOTO, steps=3, seed=5)
    torch.manual_seed(123)
    torch.rand(7)
    assert restorer.restore(PHOTO, steps=3, seed=5) == first
    assert restorer.restore(PHOTO, steps=3, seed=6) != first


def test_each_step_is_its_experts_and_offload_moves_each_once(make):
    plain, offloading, calls, moves = make(4), make(4, offload=True), [], []
    for k, (expert, moved) in enumerate(zip(plain.experts, offloading.experts, strict=True)):
        expert.register_forward_hook(lambda module, inputs, v, k=k: calls.append((k, inputs[1].item())))
        moved.to = lambda device, k=k: moves.append((k, str(device)))
    assert plain.restore(PHOTO, steps=20) == offloading.restore(PHOTO, steps=20) == make(1).restore(PHOTO, steps=20)
    assert len(calls) == 20 and calls[0][1] == 1000 and {k for k, _ in calls} == {0, 1, 2, 3}
    assert all(k == expert_of(t / 1000) for k, t in calls)
    assert moves == [(3, "cpu"), (3, "cpu"), (2, "cpu"), (2, "cpu"), (1, "cpu"), (1, "cpu"), (0, "cpu")]  # to and fro


def test_tiles_share_one_noise_and_condition(make):
    """A network that sees no neighbours gives the same latents with and without tiles. All steps' tiles are counted."""
    restorer, shapes, seen = make(), [], []

    def pointwise(z, t, c, mask, condition):
        shapes.append(z.shape[2:])
        return torch.tanh(z) + condition[:, :8] * t.item() / 1000
    restorer.experts[0].forward = pointwise
    restorer.decode = lambda z, *_: z
    whole, *others = (restorer.restore(photo(48, 40), steps=5, tile=tile, progress=lambda *what: seen.append(what))
                      for tile in (0, 96, 128))
    assert all(torch.allclose(whole, z, atol=1e-5) for z in others)
    assert {*shapes[:5]} == {(5, 6)} and all(max(shape) <= 4 for shape in shapes[5:])
    total = seen[-1][2]
    assert seen[:6] == [("dit", i, 5) for i in range(6)]  # without tiles: the steps
    assert seen[-total - 1:] == [("dit", i, total) for i in range(total + 1)] and total > 5


def test_guidance(make):
    restorer = make()
    restorer.decode = lambda z, *_: z
    found = {cfg: restorer.restore(PHOTO, "a tree", steps=1, cfg=cfg) for cfg in (0.0, 1.0, 2.0, 3.0)}
    empty = restorer.restore(PHOTO, "", suffix="none", steps=1)
    assert torch.allclose(found[0.0], empty, atol=1e-6)
    assert torch.allclose(found[3.0] - found[2.0], found[1.0] - empty, atol=1e-5)  # linear in cfg for a single step
    assert not torch.allclose(found[1.0], empty, atol=1e-4)


def test_parts_that_do_not_fit(make, sana):
    with pytest.raises(ValueError, match="3 boundaries need 4 experts, there are 2"):
        make(2)
    with pytest.raises(ValueError, match="a transformer of width 96, not of 64"):
        LinearSR([sana.dit], Stem(STEM | {"width": 96}), sana.vae, sana.prompts)
    with pytest.raises(ValueError, match="Stem config: channels must be three"):
        Stem(STEM | {"channels": [8, 8]})


# --- folders ---

@pytest.fixture
def folder(tmp_path, tiny_model, sana, stem):
    """A LinearSR folder beside its base: config.json, transformer/, stem/, experts/."""
    shutil.copytree(tiny_model, tmp_path / "base")
    made = tmp_path / "linear"
    save_module(sana.dit, made / "transformer")
    save_module(stem, made / "stem")
    for k in range(4):
        tiny.tiny_adapter(made / "experts" / f"{k}.safetensors", tiny_model, 2, "attn+ffn", {"system": "linearsr"},
                          gain=0.1 + 0.05 * k)
    write_config(made)
    return made


def write_config(folder, **changes):
    config = {"system": "linearsr", "base": "../base", "boundaries": list(BOUNDARIES), "suffix": "none"} | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_from_pretrained_and_its_faster_forms(folder, sana):
    restorer = LinearSR.from_pretrained(folder)
    assert restorer.boundaries == BOUNDARIES and isinstance(restorer.prompts, PromptEncoder)
    weights = [dit.transformer_blocks[0].attn1.to_q.weight for dit in (sana.dit, *restorer.experts)]
    assert len(weights) == 5 and not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    offloading, quick = LinearSR.from_pretrained(folder, offload=True), fast.optimise(LinearSR.from_pretrained(folder))
    plain, offloaded, quick = (model.restore(PHOTO, "tree", steps=12) for model in (restorer, offloading, quick))
    assert plain == offloaded and np.abs(np.asarray(plain, int) - np.asarray(quick, int)).max() <= 1


def error_of(folder, cls=LinearSR, **options):
    with pytest.raises((OSError, ValueError)) as caught:
        cls.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_do_not_fit(folder, tiny_model, sana):
    for changes, words in (
            (dict(boundaries=[0.9, 0.5]), "config.json: boundaries must rise within (0, 1), not 0.9, 0.5"),
            (dict(system="sana-sr"), 'no "system": "linearsr"'), (dict(base="../elsewhere"), "elsewhere"),
            (dict(suffix=5), "config.json: suffix must be a text")):
        write_config(folder, **changes)
        assert words in error_of(folder)
    write_config(folder)
    assert "no LinearSR folder" in error_of(tiny_model)
    config = sana.dit.config
    for changes, words in (
            (dict(num_attention_heads=3, cross_attention_dim=96), "does not fit a projection of 96 to 96 channels"),
            (dict(in_channels=4, out_channels=4), "the autoencoder makes 8 latent channels, the transformer wants 4")):
        save_module(LinearDiT(config | changes), folder / "transformer")
        assert words in error_of(folder)
    (folder / "experts" / "2.safetensors").unlink()
    assert "experts/2.safetensors: missing, config.json names 3 boundaries" in error_of(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in error_of(folder)


def test_adapters_of_the_other_system(folder, tiny_model):
    expert = folder / "experts" / "1.safetensors"
    assert "an adapter for linearsr, but sana-sr needs one of its own" in error_of(tiny_model, SanaSR, adapter=expert)
    tiny.tiny_adapter(expert, tiny_model, metadata={"timestep": "900"})
    assert f"{expert}: an adapter for sana-sr, but linearsr needs one of its own" in error_of(folder)


# --- eval.py, fast.py, lab/profile.py ---

def test_eval_takes_seed_and_offload(folder, here, capsys):
    photo(32, 32).save("a.png")
    found = []
    for options in (["4"], ["4", "--offload"], ["5"]):
        line = ["a.png", "--model", str(folder), "--device", "cpu", "--steps", "3", "--seed", *options]
        assert evaluator.main(line) == 0 and "dit" in capsys.readouterr().out
        found.append((here / "results" / "a_x4.png").read_bytes())
    assert found[0] == found[1] != found[2]


def test_eval_refuses_what_belongs_to_the_other_system(folder, tiny_model, tmp_path):
    PHOTO.save(tmp_path / "a.png")
    for model, system, *options in ((tiny_model, "SANA-SR, which takes one step", "--steps 20", "--cfg 2", "--offload"),
                                    (folder, "LinearSR", "--adapter none", "--timestep 900")):
        for option, *value in map(str.split, options):
            with pytest.raises(SystemExit, match=f"^error: {re.escape(f'{option}: {model} is a model of {system}')}"):
                evaluator.main([str(tmp_path / "a.png"), "--model", str(model), option, *value])


def test_profile_counts_a_step_and_the_whole(folder, capsys):
    lab.profile.main(["--side", "64", "--model", str(folder), "--device", "cpu", "--steps", "5"])
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["text", "stem", "dit, one step", "decode", "all but text, 5 steps"]
    macs = {name: float(row[2]) for name, row in rows.items()}
    assert float(rows["all but text, 5 steps"][4]) > 0
    assert macs["all but text, 5 steps"] == pytest.approx(
        macs["stem"] + 5 * macs["dit, one step"] + macs["decode"], abs=0.03)


# --- the bundled model ---

@pytest.mark.parametrize("name, options, than_bicubic, than_unsharp", [
    ("embedded", {}, 0.75, 0.93), ("linearsr-embedded", {"steps": 20}, 0.9, 1.1)])
def test_the_bundled_models_against_bicubic_and_an_unsharp_mask(name, options, than_bicubic, than_unsharp):
    hr = Image.open(ROOT / "examples/portrait.png").convert("RGB").crop((0, 0, 144, 160))
    lr = hr.resize((36, 40), Image.Resampling.BOX)
    model, enlarged = fast.load_model(name, "cpu", torch.float32), bicubic(lr)
    sharp = enlarged.filter(ImageFilter.UnsharpMask(radius=1.5, percent=300, threshold=0))
    hr, *results = (to_tensor(image)[None] * 2 - 1 for image in (hr, model.restore(lr, **options), enlarged, sharp))
    restored, enlarged, sharp = (LPIPS.from_pretrained("alex")(x, hr).item() for x in results)
    assert restored < than_bicubic * enlarged and restored < than_unsharp * sharp
    assert sum(f.stat().st_size for f in (ROOT / "weights" / name).rglob("*") if f.is_file()) < 60e6
