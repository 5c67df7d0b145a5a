import gc
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A tenth of a trace goes into looking for garbage among what torch has imported.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture
def laplace():
    """The package, which imports torchvision."""
    if importlib.util.find_spec("laplace") is None:
        pytest.skip("needs laplace-torch: make test-adapters")
    from zoo.vision import import_torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by packages it imports
        import_torchvision()
        return importlib.import_module("laplace")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
