"""Tests import the project's files from the folder above, and run single-threaded where that is faster."""
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import run  # noqa: E402  from the folder above

torch.set_num_threads(2)

SMALL = dict(arch="resnet18", hidden_dim=64, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32,
             dropout=0.0, num_queries=8)


def small_config(config_class, **values):
    """A configuration of the small detector that the tests build (frozen BatchNorm, four levels,
    no box refinement unless said)."""
    return config_class(**{**SMALL, **values})


def flags(values: dict) -> list[str]:
    """{"scales": (48, 64), "preset": "demo"} as a command line."""
    return [text for k, v in values.items()
            for text in (f"--{k}", *map(str, v if isinstance(v, (tuple, list)) else [v]))]


def plain(value):
    """A dict of metrics as json keeps it: nan is null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


def pytest_collection_modifyitems(items):
    for item in () if torch.cuda.is_available() else items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    """One thread: on tensors as small as here a second one only waits, and where other work shares the cores it
    waits five times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_processes(code: str, out: Path, world: int = 2, timeout: float = 180, device: str = "cpu") -> None:
    """`code` in `world` processes joined by gloo (CUDA: NCCL), as torchrun starts them, in the folder `out`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = ("import torch, common\n"
            "torch.set_num_threads(1)\n"
            f"assert common.setup_distributed({device!r}).type == {device!r} and common.world_size() == {world}\n"
            f"{code}\n"
            "torch.distributed.destroy_process_group()")
    processes = []
    for r in map(str, range(world)):
        env = {**os.environ, "RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=env, cwd=out,
                                          stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """What worker() of these modules gives in two processes joined by gloo, as torchrun starts them:
    {module: [rank 0, rank 1]}."""
    out = tmp_path_factory.mktemp("two_processes")
    modules = ("test_cityscapes", "test_detreg", "test_dupr", "test_finetune", "test_memory", "test_predict",
               "test_rcnn", "test_siamese_detr", "test_soco", "test_updetr", "test_validation")
    run_processes(f"for name in {modules}: torch.save(__import__(name).worker(), f'{{name}}{{common.rank()}}.pt')", out)
    return {name: [torch.load(out / f"{name}{r}.pt") for r in (0, 1)] for name in modules}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(method) -> (output folder, metrics) of the run that RUN in tests/test_<method>.py describes."""
    runs = {}

    def get(method):
        if method not in runs:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            out = tmp_path_factory.mktemp(method)
            values = importlib.import_module(f"test_{method}").RUN
            runs[method] = out, importlib.import_module(method).main(flags({**values, "out": out}))
            torch.set_num_threads(threads)
        return runs[method]

    return get


@pytest.fixture
def fails(capsys):
    """Runs a script's main() as its command does; the script must end with exit code 2 and, beside progress
    bars and warnings, ONE line on stderr, which is returned."""

    def run_script(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run.cli(lambda: main(list(map(str, argv))))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()
                 and not line.startswith("warning: ") and "%|" not in line]
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run_script


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images beside the project; a test that wants them skips where they are not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder
