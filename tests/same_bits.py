"""Do two states of the project train the same weights? `python tests/same_bits.py [REVISION]`:
before and after a change that must not change them.

Twenty steps of each demo and of fine-tuning (Deformable DETR, Faster R-CNN), one thread, fixed seed, no probe; the
sha256 of the model in last.pt. With a git REVISION the same is run from there and compared. Bits differ between
machines and versions of PyTorch, so nothing is stored.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PRETRAINING = "--synthetic_images 160 --probe_images 0"
RUNS = {name: f"{name}.py --preset demo {PRETRAINING}"
        for name in ("detreg", "updetr", "siamese_detr", "soco", "dupr")} | {
            "finetune deformable_detr": "finetune.py --preset demo --synthetic_test_images 4",
            "finetune faster_rcnn_fpn": "finetune.py --preset demo --detector faster_rcnn_fpn "
            "--synthetic_test_images 4",
        }


def model_hash(folder: Path, command: str) -> str:
    """Run a script of `folder` for 20 steps; sha256 over the names and bytes of the tensors
    of its checkpoint's model."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [sys.executable, *command.split(), "--max_steps", "20", "--num_workers", "0", "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(arguments, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        state = torch.load(Path(out) / "last.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> int:
    now = {name: model_hash(ROOT, command) for name, command in RUNS.items()}
    before = {}
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "worktree", "add", "--detach", folder, sys.argv[1]], cwd=ROOT, check=True)
            before = {name: model_hash(Path(folder), command) for name, command in RUNS.items()}
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
    for name, value in now.items():
        print(name.ljust(26), value,
              {None: "", value: "the same"}.get(before.get(name), f"DIFFERS: {before.get(name)}"))
    return int(any(before[name] != now[name] for name in before))


if __name__ == "__main__":
    sys.exit(main())
