"""Helpers and fixtures that tests share. Environment variables name the folders of data that are not in tests/data:

SANASR_DATA     photos: hq/, realsr/, inputs/
SANASR_ORACLE   goldens of official size
"""
import csv
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from seeded import seeded_module

from fast import graphs
from photos import tagger
from sanasr import SanaSR

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODEL = DATA / "model"
torch.set_num_threads(2)


def external(variable, *parts):
    """The path below an environment variable's folder, or a skip that says which one is missing."""
    path = Path(os.environ.get(variable, "/nonexistent"), *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts) or 'data'} in the folder named by {variable}")
    return path


def on_meta(cls, name, folder=MODEL, **changes):
    """The network of a manifest without weights, with other values in its config."""
    config = json.loads((folder / f"{name}.json").read_text())["config"]
    with torch.device("meta"):
        return cls(config | changes)


def golden(cls, name, folder=MODEL, dtype=torch.float32, device="cpu"):
    """The model of a manifest under seeded weights, and the tensors of its golden, inputs in `dtype`."""
    data = {key: x.to(device, dtype if key[0] in "xzc" else None)
            for key, x in load_file(folder / f"{name}.safetensors").items()}
    return seeded_module(on_meta(cls, name, folder)).to(device, dtype), data


def noise(*shape, seed=0, dtype=torch.float64):
    """Unit-normal values, the same ones for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    """‖a − b‖ / ‖b‖"""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def state(folder, name="state.pt"):
    """What a run keeps to be resumed."""
    return torch.load(folder / name, weights_only=True)


def table(path, key=None):
    """{value of `key`, by default the first column: row} of a CSV file."""
    with open(path, newline="", encoding="utf-8") as f:
        return {row[key] if key else next(iter(row.values())): row for row in csv.DictReader(f)}


def photo(width, height, seed=0):
    """A smooth random picture."""
    rgb = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rgb).resize((width, height), Image.BICUBIC)


def save_photo(path, width, height, seed):
    """`photo` in a file, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(width, height, seed).save(path)


def python(*argv, cwd=ROOT, timeout=None, **env):
    """Python in a process of its own; of `env` None takes a variable away. Returns its exit code, stdout and stderr."""
    env = {k: str(v) for k, v in (os.environ | {"PYTHONPATH": ROOT} | env).items() if v is not None}
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def in_a_process(module, owner, function, n, act, argv):
    """module.main(argv) in a session of its own, which executes the line `act` at the n-th call of owner.function."""
    script = f"""
import importlib, os
os.setsid()
module, owner = map(importlib.import_module, ({module!r}, {owner!r}))
function, count = owner.{function}, []
def acting(*args):
    count.append(1)
    if len(count) == {n}:
        {act}
    return function(*args)
owner.{function} = acting
raise SystemExit(module.main({[str(a) for a in argv]}))"""
    return python("-c", script, cwd=None, timeout=300, OMP_NUM_THREADS=1)


@pytest.fixture
def captured(monkeypatch):
    """The steps that `graphed_backward` captured. Each behaves towards its caller as a CUDA graph: it reads and writes
    the memory of its capture, inputs, values and gradients."""
    steps = []

    def record(f, inputs, clear):
        parameters = inspect.getclosurevars(clear).nonlocals["parameters"]
        f(*inputs)
        clear()
        assert all(p.grad is None for p in parameters)
        values, gradients = f(*inputs), [p.grad for p in parameters]

        def replay():
            assert all(p.grad is grad for p, grad in zip(parameters, gradients, strict=True))
            for name, value in f(*inputs).items():
                values[name].copy_(value)
            for p, grad in zip(parameters, gradients, strict=True):
                p.grad = grad.copy_(p.grad)
        steps.append(f)
        return SimpleNamespace(replay=replay), values
    monkeypatch.setattr(graphs, "record", record)
    return steps


@pytest.fixture
def seen(monkeypatch):
    """The pictures that taggers were shown. Each gets a tag of its own."""
    seen = []
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", lambda kind, device=None: SimpleNamespace(
        tags=lambda image: seen.append(image) or [kind, f"{image.width}", f"tag {len(seen)}"]))
    return seen


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five photos in nested folders, a duplicate, a small one, a broken one and a text."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(["a.png", "b.webp", "deep/er/c.jpg", "deep/d.png", "e.PNG"]):
        save_photo(folder / name, 128 + 8 * i, 112, i)
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    save_photo(folder / "small.png", 95, 300, 9)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("no picture at all")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in the official layout: small, seeded, untrained. Copy it before you change it."""
    return tiny.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, for runs/; one thread, since bits depend on the number of threads."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sana(tiny_model):
    """The tiny model, loaded. It is shared, so do not change it."""
    return SanaSR.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache, and find no weights of theirs."""
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("SANASR_WEIGHTS", raising=False)
