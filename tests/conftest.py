"""Fixtures and helpers shared by all tests. Data that is not carried here is found through environment variables:

SANASR_DATA     photos: hq/, realsr/, inputs/
SANASR_ORACLE   goldens of official size, too large to be carried here
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

torch.set_num_threads(2)


def external(variable, *parts):
    """The path below an environment variable's folder, or a skip that says which one is missing."""
    path = Path(os.environ.get(variable, "/nonexistent"), *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts) or 'data'} in the folder named by {variable}")
    return path


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def noise(width, height, seed=0):
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_photo(path, width, height, seed=0):
    """Write a smooth random picture in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(8, 6, seed).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of five smooth photos, 112 high."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        save_photo(folder / f"{i}.png", 128 + 8 * i, 112, i)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in the official layout: small, seeded, untrained. Copy it before you change it."""
    return tiny.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
