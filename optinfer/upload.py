"""Numbers of the host on a device, in a copy that nobody waits for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(numbers: Sequence | np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a list or array on `device`.

    `torch.tensor(…, device="cuda")` copies from pageable memory, for which the host waits until the GPU has done all its
    work. From pinned memory the copy takes its place in the stream.
    """
    made = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
