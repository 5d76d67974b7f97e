"""Tensors from names: the rule the parity numbers were made with (a weight file of any size without storing it)."""
import zlib

import numpy as np


def fill(name: str, shape, seed: int = 0) -> np.ndarray:
    """float32 array that depends on (name, shape, seed) only; statistics and scales stay sane,
    matrices have variance 1 / fan-in."""
    x = (np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
         .standard_normal(shape).astype(np.float32))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if name.startswith("input:"):
        return x
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if len(shape) == 1:
        return 0.5 + 0.1 * x if leaf == "weight" else 0.1 * x
    if len(shape) == 2 and ("embed" in name or "query" in name) and "layers" not in name:
        return x
    return (x / np.sqrt(int(np.prod(shape[1:])) or 1)).astype(np.float32)
