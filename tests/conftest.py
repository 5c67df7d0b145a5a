import gc
import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A tenth of a trace goes into looking for garbage among what torch has imported.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
