"""Fixtures shared by all tests. Data of one's own is found through environment variables, or the test is skipped:

SANASR_DATA     photos: hq/, realsr/, inputs/
SANASR_ORACLE   goldens of official size, too large to be carried here
"""
import os
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in the official layout: small, seeded, untrained. Copy it before you change it."""
    return tiny.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
