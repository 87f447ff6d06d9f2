"""Helpers and fixtures that tests share. Environment variables name the folders of data that are not in tests/data:

SANASR_DATA     photos: hq/, realsr/, inputs/
SANASR_ORACLE   goldens of official size
"""
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sanasr import SanaSR

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
torch.set_num_threads(2)


def external(variable, *parts):
    """The path below an environment variable's folder, or a skip that says which one is missing."""
    path = Path(os.environ.get(variable, "/nonexistent"), *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts) or 'data'} in the folder named by {variable}")
    return path


def noise(*shape, seed=0, dtype=torch.float64):
    """Unit-normal values, the same ones for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    """‖a − b‖ / ‖b‖"""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def photo(width, height, seed=0):
    """A smooth random picture."""
    rgb = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rgb).resize((width, height), Image.BICUBIC)


def save_photo(path, width, height, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(width, height, seed).save(path)


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


@pytest.fixture(scope="session")
def sana(tiny_model):
    """The tiny model, loaded. It is shared, so do not change it."""
    return SanaSR.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
