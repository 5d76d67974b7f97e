"""Tests import the project's files from the folder above, and run single-threaded where that is faster on small tensors."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(2)

SMALL = dict(arch="resnet18", hidden_dim=64, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32, dropout=0.0, num_queries=8)


def small_config(config_class, **values):
    """A configuration of the small detector that the tests build (frozen BatchNorm, four levels, no box refinement unless said)."""
    return config_class(**{**SMALL, **values})


def flags(values: dict) -> list[str]:
    """{"scales": (48, 64), "preset": "demo"} as a command line."""
    return [text for k, v in values.items() for text in (f"--{k}", *map(str, v if isinstance(v, (tuple, list)) else [v]))]


@pytest.fixture
def fails(capsys):
    """Runs a script's main() as its command does; the script must end with exit code 2 and ONE line on stderr, which is returned."""
    import common

    def run(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            common.cli(lambda: main(list(map(str, argv))))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not line.startswith("warning: ")]
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images beside the project; a test that wants them skips where they are not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder
