"""Run a module as on a GPU, in minutes: `python -m tests.pretend_gpu -m MODULE …`; the card is named in PRETEND_GPU."""

import os
import runpy
import sys

from tests.pretend_gpu import environment, once
from tests.pretend_gpu.plugin import install

if __name__ == "__main__":
    card = os.environ.get("PRETEND_GPU", "h100")
    os.environ.update(environment(card))
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # its CUDA library would need a real one
    install(card)
    once.install()
    if sys.argv[1:2] != ["-m"] or len(sys.argv) < 3:
        sys.exit("usage: python -m tests.pretend_gpu -m MODULE …")
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
