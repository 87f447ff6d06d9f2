"""The objective: every loss against another formulation, its gradients, the LPIPS network, the lattice measure."""
import copy
import math
import shutil
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, noise

import metrics
import objective
import weights
from sanasr import SanaSR, inject_lora, lora_parameters

CPU = torch.device("cpu")


def test_align_loss_is_the_divergence_of_gaussians():
    q, q_h = 2 * noise(3, 5, 4, 6) + 1, 0.001 * noise(3, 5, 4, 6, seed=1)
    gaussians = [torch.distributions.Normal(x.mean((2, 3)), x.std((2, 3), correction=0)) for x in (q, q_h)]
    want = torch.distributions.kl_divergence(*gaussians).mean()
    assert torch.allclose(objective.align_loss(q, q_h, eps=0.0), want, rtol=1e-12)
    total, eps = 0.0, 1e-6  # and with the stabiliser, as large as a variance here, by the letter of Eq. 5
    for a, b in zip(q.reshape(15, 24).numpy(), q_h.reshape(15, 24).numpy(), strict=True):
        total += math.log((b.var() + eps) / (a.var() + eps)) - 1
        total += (a.var() + (a.mean() - b.mean()) ** 2) / (b.var() + eps)
    assert math.isclose(objective.align_loss(q, q_h), total / 30, rel_tol=1e-12)
    assert abs(objective.align_loss(q, q)) < 1e-5


class Double:
    """A model in float64 with a trained-looking adapter, its prior as a separate copy, and one batch."""

    def __init__(self, folder):
        model = SanaSR.from_pretrained(folder, adapter=False)
        self.vae, self.s, self.dit = model.vae.double(), model.scaling_factor, model.dit.double()
        self.frozen = copy.deepcopy(model.dit)
        inject_lora(self.dit, 2, targets="attn+ffn")
        self.dit.double()
        self.adapter = lora_parameters(self.dit)
        for i, p in enumerate(self.adapter.values()):
            p.data = 0.1 * noise(*p.shape, seed=i)
        self.batch = {
            "x_L": noise(2, 3, 96, 96).tanh(), "x_H": noise(2, 3, 96, 96, seed=1).tanh(),
            "c": noise(2, 5, 32, seed=2), "m": torch.tensor([[1, 1, 1, 1, 0], [1] * 5]),
            "t": torch.tensor([70.0, 650.0]).double(), "noise": noise(2, 8, 3, 3, seed=3)}
        self.encoded = []

    def encode(self, x):
        self.encoded.append(len(x))
        return self.vae.encode(x) * self.s

    def decode(self, z):
        return self.vae.decode(z / self.s)

    def prior(self, *args):
        with objective.adapters_off(self.dit):
            return self.dit(*args)

    def losses(self, terms=objective.PAPER):
        return objective.losses(self.dit, self.prior, self, self.batch, 900,
                                lambda x, y, _: (x - y).abs().mean((1, 2, 3)), terms)  # in place of LPIPS

    def gradient(self, terms=objective.PAPER):
        return torch.autograd.grad(self.losses(terms)["loss"], list(self.adapter.values()))


@pytest.fixture
def double(tiny_model):
    return Double(tiny_model)


def test_losses_follow_algorithm_1(double):
    b, s = double.batch, 0.41407
    c, m, t = b["c"], b["m"], b["t"]
    z_l, z_h = s * double.vae.encode(b["x_L"]), s * double.vae.encode(b["x_H"])
    z = z_l - 0.9 * double.dit(z_l, torch.full((2,), 900.0).double(), c, m)
    x = double.vae.decode(z / s)
    sigma = (t / 1000)[:, None, None, None]
    noised, noised_h = ((1 - sigma) * v + sigma * b["noise"] for v in (z, z_h))
    q, q_h = double.frozen(noised, t, c, m), double.frozen(noised_h, t, c, m)   # the prior as a copy, never adapted
    want = {"mse": ((x - b["x_H"]) ** 2).sum() / x.numel(), "lpips": (x - b["x_H"]).abs().mean(),
            "align": objective.align_loss(q, q_h), "cons": ((double.dit(noised, t, c, m) - q) ** 2).sum() / q.numel()}
    want = {"loss": want["mse"] + 2 * want["lpips"] + want["align"] + want["cons"]} | want
    values = double.losses()
    assert list(values) == list(want) and double.encoded == [4], "both pictures in one pass"
    for k in want:
        assert torch.allclose(values[k], want[k], rtol=1e-10, atol=0), k
    theirs = torch.autograd.grad(want["loss"], list(double.adapter.values()))
    values["loss"].backward()
    ours = [p.grad for p in double.adapter.values()]
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    frozen = [p for n, p in double.dit.named_parameters() if "lora" not in n] + list(double.vae.parameters())
    assert all(p.grad is None for p in frozen)
    double.losses({"mse": 1.0, "cons": 1.0})
    assert double.encoded == [4, 2], "x_H is encoded for L_align and `latent` alone"
    double.decode = None
    far = z_l - z_h
    want = sum((e ** 2).sum() / ((d ** 2).sum() + (far ** 2).sum() / len(far))
               for e, d in zip(z - z_h, far, strict=True))
    assert torch.allclose(double.losses({"latent": 1.0})["latent"], want / len(far), rtol=1e-10, atol=0)


@pytest.mark.parametrize("term", ["mse", "align", "cons", "lattice", "latent"])
def test_gradient_of_each_term_by_differences(double, term):
    got, p, values = double.gradient({term: 1.0})[3].view(-1)[1].item(), list(double.adapter.values())[3], []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            p.view(-1)[1] += step
            values.append(double.losses({term: 1.0})["loss"].item())
            p.view(-1)[1] -= step
    assert got != 0 and math.isclose(got, (values[0] - values[1]) / 2e-5, rel_tol=1e-4)


def test_checkpointing_changes_no_gradient(double):
    plain = double.gradient()
    double.dit.checkpointing = double.vae.decoder.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, double.gradient(), strict=True))


def pictures():
    x = noise(2, 3, 96, 96).tanh().float()
    return x, (x + 0.3 * noise(2, 3, 96, 96, seed=1).float()).clamp(-1, 1)


def test_lpips_in_bfloat16_judges_alike():
    x, y = (v.requires_grad_() for v in pictures())
    batch, own = {"shift": torch.zeros(2, 2, dtype=torch.long)}, metrics.LPIPS.from_pretrained("alex")
    (full, _), (half, _) = (objective.load_lpips("alex", CPU, d) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(full(x, y, batch), own(x, y)) and torch.allclose(own(x, y), half(x, y, batch), rtol=0.03)
    gradients = [torch.autograd.grad(f(x, y, batch).sum(), x)[0].flatten() for f in (full, half)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_without_vgg16_alexnet_judges_shifted_pictures_on_all_ranks_and_one_line_says_so(monkeypatch, capsys):
    load, asked, sent = metrics.LPIPS.from_pretrained, [], []

    def from_pretrained(net):
        asked.append(net)
        if net == "vgg":
            raise weights.Unavailable("VGG16 is\nnot on this machine")
        return load(net)
    monkeypatch.setattr(objective.LPIPS, "from_pretrained", from_pretrained)
    for rank in (0, 1):
        monkeypatch.setattr(objective, "ranks", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(objective, "from_first", lambda make: (sent or sent.append(make()) or sent)[0])
        judge, net = objective.load_lpips("vgg", CPU, torch.float32)
        assert net == "alex"
        (x, y), own = pictures(), load("alex")
        for top, left in ((0, 0), (5, 31)):
            got = judge(x, y, {"shift": torch.tensor([[top, left], [9, 9]])})  # the first sample's shift holds for all
            assert torch.equal(got, own(x[:, :, top:, left:], y[:, :, top:, left:]))
    assert sent == ["alex"] and asked == ["vgg", "alex", "alex"], "only the first rank tries VGG16"
    assert capsys.readouterr().err == "note: the LPIPS loss uses AlexNet: VGG16 is not on this machine\n"


def test_lattice_is_the_share_that_repeats_in_every_cell():
    pattern, white = noise(2, 3, 32, 32), noise(2, 3, 256, 256, seed=1)
    assert objective.lattice(pattern.repeat(1, 1, 5, 7)) == pytest.approx(1, abs=1e-9)
    assert objective.lattice(F.pad(pattern.repeat(1, 1, 4, 4) + 3, (0, 9, 0, 31))) == pytest.approx(1, abs=1e-9)
    assert objective.lattice(white) == pytest.approx(1 / 64, rel=0.05)
    dots = torch.zeros(1, 1, 256, 256).double()
    dots[:, :, 7::32, 20::32] = 8
    assert objective.lattice(white + dots) == pytest.approx((1 / 64 + 1 / 16) / (1 + 1 / 16), rel=0.1)
    assert objective.lattice(torch.zeros(1, 3, 128, 128)) == 0


def filled(folder, tags=None, lpips=None, protocol="hq", metadata=None):
    model = SanaSR.from_pretrained(folder, adapter=False)
    args = Namespace(crop=None, suffix=None, timestep=None, protocol=protocol, tags=tags, lpips=lpips)
    objective.fill_defaults(args, model, metadata)
    return args


def test_the_models_files_say_how_it_is_trained_not_its_name(tiny_model, tmp_path):
    shutil.copytree(ROOT / "weights" / "embedded", tmp_path / "elsewhere")
    by_name, by_path = filled("embedded"), filled(tmp_path / "elsewhere")
    assert by_name == by_path and (by_path.tags, by_path.lpips) == ("none", "alex")
    wanted = filled(tmp_path / "elsewhere", "ram", "vgg")
    assert (wanted.tags, wanted.lpips) == ("ram", "vgg")
    adapter = {"protocol": "hq", "timestep": "850.0"}
    assert [filled("embedded", protocol=p, metadata=adapter).timestep for p in ("hq", "lq")] == [850, 999]
    plain = filled(tiny_model)
    assert (plain.tags, plain.lpips, plain.crop, plain.timestep, plain.suffix) == ("ram", "vgg", 128, 900, "appendix")
