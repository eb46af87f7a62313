"""The day there is a GPU: one command that checks and measures everything, and keeps what it has when it is cut short.

    python -m optinfer.bench.gpu_day --minutes 25 --out day      # again: goes on where it stopped
    python -m optinfer.bench.gpu_day --keep day                  # its recordings into data/results

torch, triton and transformers are enough. Written are `day.json` (what was done), `recordings.json` (what was measured),
`summary.md` (what failed, with the command that repeats it), `tiles.patch` (faster tiles, if any) and `log.txt`.

`OPTINFER_DAY_PYTHON` is the command that stands for Python in the steps, for a rehearsal with a pretended GPU.
"""
