"""Every test runs offline, from one seed, with a fixed number of threads."""

import gc
import os
import sys
from pathlib import Path

import pytest

# Read by the libraries when they are imported: this file is imported before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Any test may say `from tiny import tiny_llama`, whatever pytest's import mode and the working directory; so may the
# processes that tests start.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from places import PATHS  # noqa: E402

sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH")]))


def pytest_collection_finish():
    """What the imports have made stays, so the garbage collector need not go through it after every training run."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """Two threads at most: a tiny model gains nothing from more, and the tests share their machine."""
    import torch

    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture(autouse=True)
def _seed():
    """Each test starts from the same seed, whichever tests ran before it."""
    from transformers import set_seed

    set_seed(0)
