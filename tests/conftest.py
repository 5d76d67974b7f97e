"""Tests import the project's files from the folder above, and run single-threaded where that is faster on small tensors."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images beside the project; a test that wants them skips where they are not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder
