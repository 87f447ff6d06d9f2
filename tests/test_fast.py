"""The rewrites of fast.py give what the plain path gives, on the smallest models that have every part."""
import ctypes
import sys
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import golden, on_meta, python, relative
from seeded import seeded_input, seeded_module
from torch.fx.experimental.proxy_tensor import make_fx

import fast
import sanasr
from lab.bench import seeded
from sanasr import DCAE, LinearDiT, SanaSR, inject_lora

CHANNELS_TO_SPACE = dict(  # the other kinds of block, and no block at all at full resolution
    latent_channels=32, attention_head_dim=32, upsample_block_type="pixel_shuffle",
    downsample_block_type="pixel_unshuffle",
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in dict(
        block_out_channels=[16, 64, 64, 128, 128, 64], block_types=["ResBlock"] * 5 + ["EfficientViTBlock"],
        layers_per_block=[0, 1, 1, 1, 1, 1], qkv_multiscales=[[], [], [], [], [], [3, 5]]).items()})


def agree(plain, quick, x, tolerance=1e-5):
    """Encoder and decoder, which leave their inputs as they are: in place means inside only."""
    z, before = plain.encode(x), x.clone()
    y, latents = plain.decode(z), z.clone()
    assert relative(quick.encode(x), z) < tolerance and relative(quick.decode(z), y) < tolerance
    assert torch.equal(x, before) and torch.equal(z, latents)


@pytest.mark.parametrize("batch, height, width", [(1, 64, 96), (2, 96, 32)])
@pytest.mark.parametrize("rewrites", [*([name] for name in fast.REWRITES), list(fast.REWRITES)], ids="+".join)
@torch.inference_mode()
def test_vae(rewrites, batch, height, width, monkeypatch):
    monkeypatch.setattr(fast, "STRIP", 5000)  # several strips even here
    monkeypatch.setattr(fast.winograd, "TILES", 24)
    plain = golden(DCAE, "dcae_small")[0]
    quick = fast.optimise_vae(deepcopy(plain), rewrites)
    assert any(type(m).__module__ == "fast" for m in quick.modules()) or rewrites == ["down"] and not any(
        isinstance(m, sanasr.DownBlock) for m in quick.modules())
    agree(plain, quick, seeded_input("x", (batch, 3, height, width)))


@torch.inference_mode()
def test_vae_of_the_other_blocks():
    plain = seeded(DCAE, CHANNELS_TO_SPACE, torch.float32, "cpu")
    quick = fast.optimise_vae(deepcopy(plain))
    assert not any(isinstance(m, sanasr.UpBlock | sanasr.ResBlock) for m in quick.modules())
    agree(plain, quick, seeded_input("x", (2, 3, 64, 96)))


@pytest.mark.parametrize("out", [16, 32, 64])
@torch.inference_mode()
def test_up_block(out, monkeypatch):
    monkeypatch.setattr(fast, "TOKENS", 20)  # strips of three rows
    plain = sanasr.UpBlock(64, out, nearest=True)
    x = seeded_input("x", (2, 64, 7, 6)).contiguous(memory_format=torch.channels_last)
    assert relative(fast.UpBlock(plain)(x), plain(x)) < 1e-6
    assert relative(fast.FoldedUpBlock(plain)(x), plain(x)) < 1e-6  # on a GPU, where its last step is a kernel


@torch.inference_mode()
def test_the_low_resolutions_blocks_as_on_a_gpu():
    """With the kernels' references."""
    plain = seeded(lambda config: sanasr.EfficientViTBlock(64, 32, config), [3, 5], torch.float32, "cpu")
    x = seeded_input("x", (2, 64, 7, 6))
    quick = fast.GatedConv(plain.conv_out)(fast.MultiscaleAttention(plain.attn)(x.clone()))
    assert relative(quick, plain(x)) < 1e-5


@torch.inference_mode()
def test_vae_bfloat16_is_hardly_further_from_float32_than_the_plain_path():
    stages = dict(block_out_channels=[128, 256, 64], block_types="ResBlock", layers_per_block=[2, 2, 1],
                  qkv_multiscales=[[]] * 3)
    config = dict(latent_channels=32, upsample_block_type="interpolate", downsample_block_type="Conv",
                  **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in stages.items()})
    exact, plain = seeded(DCAE, config, torch.float32, "cpu"), seeded(DCAE, config, torch.bfloat16, "cpu")
    quick = fast.optimise_vae(deepcopy(plain))
    assert sum(isinstance(m, fast.Winograd) for m in quick.modules()) == 16  # the wide ones, in bfloat16 too
    x = seeded_input("x", (1, 3, 64, 64))
    z = exact.encode(x)
    y = exact.decode(z)
    half = torch.bfloat16
    assert relative(quick.encode(x.to(half)), z) < 1.5 * relative(plain.encode(x.to(half)), z)
    assert relative(quick.decode(z.to(half)), y) < 1.5 * relative(plain.decode(z.to(half)), y)


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_dit(batch):
    plain = golden(LinearDiT, "dit_small")[0]
    quick, config = fast.FastDiT(deepcopy(plain)), plain.config
    z = seeded_input("z", (batch, config["in_channels"], 4, 6))
    c, t = seeded_input("c", (batch, 7, config["caption_channels"])), torch.full((batch,), 900.0)
    mask = torch.ones(batch, 7)
    mask[-1, 4:] = 0
    changes = (lambda: None, lambda: None,  # the second call takes what the first has kept: by value, not by name
               lambda: c[0, 0].add_(1), lambda: t.sub_(300), lambda: mask[0, 0].zero_(), lambda: t[0].add_(100))
    for change in changes:
        change()
        assert relative(quick(z, t, c, mask), plain(z, t, c, mask)) < 1e-5


@pytest.fixture
def graphs(monkeypatch):
    """(device, calls that were captured). Without a GPU a graph is the trace of one call's operators: like a CUDA graph
    it knows nothing but the memory that they read and wrote."""
    captured, really = [], fast.graphs.record

    def record(f, inputs, clear=None):
        captured.append(f)
        if torch.cuda.is_available():
            return really(f, inputs, clear)
        present = [x for x in inputs if x is not None]

        def call(*tensors):
            tensors = iter(tensors)
            return f(*[None if x is None else next(tensors) for x in inputs])
        traced, result = make_fx(call)(*present), f(*inputs)
        return SimpleNamespace(replay=lambda: result.copy_(traced(*present))), result

    monkeypatch.setattr(fast.graphs, "record", record)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda" if torch.cuda.is_available() else "cpu", captured


@torch.inference_mode()
def test_graphs_of_the_autoencoder(graphs):
    device, captured = graphs
    vae = golden(DCAE, "dcae_small")[0].to(device)
    quick = fast.optimise_vae(deepcopy(vae), graphs=True)
    shapes = (64, 64), (64, 64), (32, 64), (64, 64), (64, 64), (32, 64), (32, 64)
    x = [seeded_input(str(i), (1, 3, *shape)).to(device) for i, shape in enumerate(shapes)]
    z = [vae.encode(part) for part in x]
    for ours, plain in zip([quick.encode(part) for part in x], z, strict=True):  # all first: no result is lost
        assert relative(ours, plain) < 1e-5
    for ours, part in zip([quick.decode(part) for part in z], z, strict=True):
        assert relative(ours, vae.decode(part)) < 1e-5
    assert len(captured) == 4  # encoder and decoder, each for both shapes


@torch.inference_mode()
def test_graphs_of_the_transformer_serve_all_prompts_and_timesteps(graphs):
    device, captured = graphs
    dit = golden(LinearDiT, "dit_small")[0].to(device)
    quick, channels = fast.FastDiT(deepcopy(dit), graphs=True), dit.config["caption_channels"]
    texts = [(seeded_input(name, (1, n, channels)).to(device), torch.ones(1, n, device=device))
             for name, n in (("tree", 7), ("house", 9), ("", 2))]
    texts[2][1].zero_()  # masked as a whole: attention is uniform, over its own two tokens
    z, e = (seeded_input(name, (1, n, 4, 6)).to(device) for name, n in (("z", dit.config["in_channels"]), ("e", 64)))
    for width, condition, prompts, times in ((6, False, "0122", [900]), (5, True, "010101", [900, 300, 300]),
                                             (6, False, "2", [100])):
        for t in times:
            for i in prompts:
                x = z[..., :width], torch.full((1,), t, device=device), *texts[int(i)]
                x = *x, e[..., :width] if condition else None
                assert relative(quick(*x), dit(*x)) < 1e-5
    assert len(captured) == 2  # two sizes, one with a condition
    assert quick.made == {"text": 6, "time": 3}  # 0, 1, 2, then 0 and 1 alternate, then 2; 900, 300, 100
    assert quick.texts and not quick.to("cpu").texts, "an expert that leaves the device leaves nothing there"


@torch.inference_mode()
def test_graphs_that_were_not_used_of_late_are_dropped(graphs, monkeypatch):
    monkeypatch.setattr(fast.graphs, "KEEP", 2)
    device, captured = graphs
    double = fast.Graphed(lambda x: 2 * x)
    for n in (1, 1, 2, 2, 1, 3, 3, 2, 1, 1, 2, 2):  # 3 takes the place of 2
        assert torch.equal(double(torch.full((n,), n, device=device)), torch.full((n,), 2 * n, device=device))
    assert len(captured) == 4 and len(double.graphs) == len(double.buffers) == 2


@torch.inference_mode()
def test_where_no_graph_can_be_captured_it_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(fast.graphs, "record", Mock(side_effect=RuntimeError("operation not\npermitted")))
    double = fast.Graphed(lambda x: 2 * x, at_once=True)
    assert all(torch.equal(double(torch.ones(n)), 2 * torch.ones(n)) for n in (1, 1, 2, 2))
    assert capsys.readouterr().err.count("no CUDA graph, so kernels are launched one by one, which is slower: "
                                         "operation not permitted\n") == 1


def test_a_training_whose_step_is_a_graph_is_the_same(captured):
    def loss(batch):
        error = (network(batch["x"]) - batch["y"]).square().mean()
        return {"loss": error, "twice": 2 * error}
    found = []
    for graph in (True, False):
        torch.manual_seed(0)
        network, values = torch.nn.Linear(3, 2), []
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        backward = fast.graphs.graphed_backward(loss, network.parameters())
        for i, n in enumerate((4, 4, 4, 2, 4)):
            batch = {"x": seeded_input(f"x{i}", (n, 3)), "y": seeded_input(f"y{i}", (n, 2)), "names": ["a"]}
            values.append((backward if graph else loss)(batch))
            if not graph:
                optimizer.zero_grad()
                values[-1]["loss"].backward()
            optimizer.step()
        found.append([[v[name].item() for v in values] for name in ("loss", "twice")] + [network.weight.detach()])
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
    assert len(captured) == 3  # another shape takes the graph's place


def test_adapters_must_be_merged():
    dit = golden(LinearDiT, "dit_small")[0]
    inject_lora(dit, rank=2)
    with pytest.raises(ValueError, match="merge_lora"):
        fast.FastDiT(dit)


def test_auto_means_graphs_on_a_gpu(monkeypatch):
    found = []
    monkeypatch.setattr(fast, "is_linearsr", lambda *args: False)
    monkeypatch.setattr(SanaSR, "from_pretrained", lambda *args: "model")
    monkeypatch.setattr(fast, "keep_memory", lambda: None)
    monkeypatch.setattr(fast, "optimise", lambda model, graphs: found.append(graphs))
    for device, choice in (("cpu", "auto"), ("cpu", "on"), ("cuda", "auto"), ("cuda", "on"), ("cuda", "off"),
                           ("mps", "auto")):
        fast.load_model("model", device, fast=choice)
    assert found == [False, False, True, True]


@pytest.mark.slow
@torch.inference_mode()
def test_official_size():
    plain, dit = (seeded_module(on_meta(*part)) for part in ((DCAE, "dcae_f32c32_sana"), (LinearDiT, "dit_sana_600m")))
    x = seeded_input("x", (1, 3, 512, 512))
    agree(plain, fast.optimise_vae(deepcopy(plain)), x, 1e-4)
    c = seeded_input("c", (1, 300, dit.config["caption_channels"]))
    arguments = plain.encode(x), torch.full((1,), 900.0), c, torch.ones(1, 300)
    f = dit(*arguments)
    assert relative(fast.FastDiT(dit)(*arguments), f) < 1e-4


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_kept_memory_is_not_asked_for_again():
    code = """
import resource, torch, fast
if {keep}: fast.keep_memory()
for i in range(12):  # 64 MB each
    if i == 4: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = [int(python("-c", code.format(keep=keep)).stdout) for keep in (False, True)]
    assert faults[1] < faults[0] / 2, "pages that the kernel had to provide for the last eight tensors"
