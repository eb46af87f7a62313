"""One attention under everything: each backend gives the text of `generate`, and those that read pages in place copy none."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optinfer import cpu
from optinfer.serving import Engine, SamplingParams

pytest.importorskip("triton")

PROMPTS = [[7, 8, 9] * 4, [5], list(range(20, 31)), [*range(20, 31), 40]]
IN_PLACE = ["triton", *(["loops"] if cpu.kernels() is not None else [])]


def serve(model, prompts=PROMPTS, max_tokens=6, **options):
    engine = Engine(model, **{"num_blocks": 40, "block_size": 4} | options)
    done = engine.generate(prompts, SamplingParams(max_tokens=max_tokens))
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    return engine, [c.token_ids for c in done]


SCHEDULES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(8, 20),
        "block_size": st.sampled_from([4, 5, 16]),
        "max_batched_tokens": st.sampled_from([3, 8, 64]),
        "policy": st.sampled_from(["continuous", "prefill_first", "static"]),
        "prefix_caching": st.booleans(),
        "draft": st.sampled_from([None, "prompt_lookup"]),
        "fuse": st.booleans(),
    }
)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEDULES, st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=14), min_size=1, max_size=4))
def test_the_kernel_interpreted_under_any_schedule(model, reference, schedule, prompts):
    _, found = serve(model, prompts, 4, attention_backend="triton", **schedule)
    assert found == [reference(prompt, 4) for prompt in prompts]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEDULES, st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=30), min_size=1, max_size=7))
def test_the_kernel_interpreted_under_many_schedules(model, reference, schedule, prompts):
    schedule = schedule | {"num_blocks": schedule["num_blocks"] + 6}
    _, found = serve(model, prompts, 8, attention_backend="triton", **schedule)
    assert found == [reference(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("fuse", [True, False], ids=["lean", "modules"])
@pytest.mark.parametrize("backend", ["triton", "loops", "sdpa", "reference"])
def test_every_backend_gives_the_text(model, reference, backend, fuse):
    if backend == "loops" and backend not in IN_PLACE:
        pytest.skip("no C++ compiler")
    _, found = serve(model, attention_backend=backend, fuse=fuse)
    assert found == [reference(prompt, 6) for prompt in PROMPTS]


class CopiesOf(TorchDispatchMode):
    """Counts what is copied out of the pages, by watching every operation of torch: while it is open, `nbytes` adds up
    the results that were made from the pool's memory and lie elsewhere."""

    def __init__(self, pool):
        super().__init__()
        self.nbytes = 0
        self._pages = {t.untyped_storage().data_ptr() for t in (pool.keys, pool.values)}

    def _in_pages(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._pages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(map(self._in_pages, tree_leaves((args, kwargs)))):
            self.nbytes += sum(
                t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor) and not self._in_pages(t)
            )
        return result


def copied(model, backend, n=1, **options):
    """Bytes copied out of pages, as seen from outside and as the pool counts them."""
    engine = Engine(model, num_blocks=40, block_size=4, attention_backend=backend, **options)
    params = SamplingParams(max_tokens=6, n=n, temperature=1.0 if n > 1 else 0.0, ignore_eos=True)
    with CopiesOf(engine.runner.pool) as copies:
        engine.generate(PROMPTS, params)
    return copies.nbytes, engine.runner.pool.copied_bytes


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["as the model", "int8"])
@pytest.mark.parametrize("fuse", [True, False], ids=["lean", "modules"])
@pytest.mark.parametrize("backend", IN_PLACE)
def test_reading_in_place_copies_nothing(model, backend, fuse, kv_dtype):
    assert copied(model, backend, fuse=fuse, kv_dtype=kv_dtype) == (0, 0)


@pytest.mark.parametrize("backend", IN_PLACE)
def test_all_that_is_copied_is_copied_on_write(model, backend):
    seen, counted = copied(model, backend, n=3)
    assert seen == counted > 0


def test_the_counter_can_count(model):
    """The backends that gather see all that every decoding step reads."""
    for backend in ("sdpa", "reference"):
        seen, _ = copied(model, backend, fuse=False)
        tokens = sum(len(prompt) * 6 for prompt in PROMPTS)
        assert seen > tokens * 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, numbers, bytes
