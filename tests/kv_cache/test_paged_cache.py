"""generate with pages gives the tokens that generate without pages gives."""

import pytest
import torch
from transformers import DynamicCache

from optinfer.kv_cache import OutOfBlocks, PagedCache, kv_bytes_per_token
from optinfer.kv_cache.pool import KVPool, quantize_kv

MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


def scrambled(model, num_blocks=64, block_size=4, **kwargs):
    """A paged cache whose free blocks are in random order, so that no table is contiguous by luck."""
    cache = PagedCache.for_model(model, num_blocks, block_size, **kwargs)
    for block in torch.randperm(num_blocks).tolist():
        cache.manager._free_queue.move_to_end(block)
    return cache


def generate(model, cache, batch=1, seed=0, new=20, **kwargs):
    torch.manual_seed(seed)
    prompt = torch.randint(1, 101, (batch, 7), generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    if "prompt_lookup_num_tokens" in kwargs:
        prompt = prompt.repeat(1, 3)
    mask = torch.ones_like(prompt)
    if batch > 1:
        mask[0, :3] = 0  # left padding
    return model.generate(
        prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **kwargs}
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_generate_is_token_identical(tiny_model, mode, batch, block_size):
    if mode == "prompt lookup" and batch > 1:
        pytest.skip("transformers speculates on one sequence at a time")
    for seed in range(3):
        expected = generate(tiny_model, DynamicCache(config=tiny_model.config), batch, seed, **MODES[mode])
        cache = scrambled(tiny_model, 512 // block_size, block_size)
        assert torch.equal(generate(tiny_model, cache, batch, seed, **MODES[mode]), expected)
        cache.manager.check_integrity()
        cache.reset()
        assert cache.manager.num_free_blocks == cache.manager.num_blocks


def test_logits_are_equal_bit_for_bit(tiny_model):
    tokens = torch.randint(0, 101, (2, 30))
    paged, dynamic = scrambled(tiny_model), DynamicCache(config=tiny_model.config)
    with torch.inference_mode():
        for part in tokens.split([13, 1, 1, 9, 6], dim=1):
            a = tiny_model(part, past_key_values=paged).logits
            b = tiny_model(part, past_key_values=dynamic).logits
            assert torch.equal(a, b)


def test_crop_by_a_tensor(tiny_model):
    """Some versions of transformers count the tokens to remove in a tensor; no two layers may come to share it."""
    tokens = torch.randint(0, 101, (1, 12))
    lengths = []
    for removed in (-3, torch.tensor(-3)):
        cache = scrambled(tiny_model)
        with torch.inference_mode():
            tiny_model(tokens, past_key_values=cache)
            cache.crop(removed)
            tiny_model(tokens[:, :2], past_key_values=cache)
        lengths.append([layer.get_seq_length() for layer in cache.layers])
    assert lengths[0] == lengths[1] == [11] * len(cache.layers)


def test_a_wrong_block_would_be_noticed(tiny_model):
    expected = generate(tiny_model, DynamicCache(config=tiny_model.config))
    cache = scrambled(tiny_model)
    gather = cache.pool.gather
    cache.pool.gather = lambda index, blocks, *rest: gather(index, blocks.roll(1, 1), *rest)
    assert not torch.equal(generate(tiny_model, cache), expected)


def test_a_forgotten_copy_on_write_would_be_noticed(tiny_model):
    expected = generate(tiny_model, DynamicCache(config=tiny_model.config), 2, **MODES["beams"])
    cache = scrambled(tiny_model)
    cache.pool.copy_blocks = lambda copies: None
    assert not torch.equal(generate(tiny_model, cache, 2, **MODES["beams"]), expected)


def test_beams_share_their_prompt(tiny_model):
    cache = scrambled(tiny_model, 512, 1)
    generate(tiny_model, cache, num_beams=3, new=10)
    separate = sum(map(len, cache.block_tables))
    assert cache.manager.num_blocks - cache.manager.num_free_blocks < separate


def test_a_conversation_goes_on_in_the_same_cache(tiny_model):
    prompt = torch.randint(1, 101, (1, 9))
    caches = scrambled(tiny_model), DynamicCache(config=tiny_model.config)
    texts = [prompt, prompt]
    for _ in range(3):
        texts = [
            tiny_model.generate(text, past_key_values=cache, max_new_tokens=6, do_sample=False)
            for text, cache in zip(texts, caches)
        ]
        texts = [torch.cat([text, prompt[:, :2]], 1) for text in texts]
    assert torch.equal(*texts)


def test_out_of_blocks_is_raised_before_anything_is_written(tiny_model):
    cache = PagedCache.for_model(tiny_model, num_blocks=3, block_size=4)
    tokens = torch.randint(0, 101, (1, 10))
    with torch.inference_mode():
        tiny_model(tokens, past_key_values=cache)
        before = cache.manager.snapshot(), cache.layers[0].keys.clone(), cache.get_seq_length()
        with pytest.raises(OutOfBlocks, match="needs 1 new blocks, 0 available"):
            tiny_model(tokens[:, :3], past_key_values=cache)
    assert cache.manager.snapshot() == before[0] and cache.get_seq_length() == before[2]
    assert torch.equal(cache.layers[0].keys, before[1])


def test_bad_arguments_are_refused(tiny_model):
    with pytest.raises(ValueError, match="dtype must be one of"):
        PagedCache.for_model(tiny_model, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_blocks"):
        PagedCache.for_model(tiny_model, 0)
    cache = scrambled(tiny_model)
    with torch.inference_mode():
        tiny_model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences, the batch has 1"):
            tiny_model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot remove 6 of 5 tokens"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="must not be positive"):
        cache.crop(3)
    sliding = type(tiny_model.config)(**{**tiny_model.config.to_dict(), "layer_types": ["sliding_attention"] * 3})
    with pytest.raises(ValueError, match="sliding_attention"):
        PagedCache(sliding, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_the_pool_is_as_large_as_the_formula_says(tiny_model, dtype):
    cache = PagedCache.for_model(tiny_model, num_blocks=5, block_size=4, dtype=dtype)
    assert cache.nbytes == 5 * 4 * kv_bytes_per_token(tiny_model.config, dtype)


def test_int8_error_is_at_most_half_a_step():
    x = torch.randn(5, 7, 3, 64, dtype=torch.float64) * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None, None]
    x[0, 0] = 0
    q, scale = quantize_kv(x.float())
    error = (q.double() * scale.double()[..., None] - x).abs()
    assert (error <= scale.double()[..., None] * 0.5 * (1 + 1e-5)).all()
    assert q.dtype == torch.int8 and q.min() >= -127


def test_int8_stays_close_to_the_model(tiny_model):
    tokens = torch.randint(0, 101, (2, 40))
    with torch.inference_mode():
        exact = tiny_model(tokens).logits
        rounded = tiny_model(tokens, past_key_values=scrambled(tiny_model, dtype=torch.int8)).logits
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_single_tokens_move_all_at_once(dtype):
    """A slot may be read and written in one call: each gets what lay there before."""
    pool = KVPool(2, 3, 8, num_blocks=4, block_size=4, dtype=dtype, device=torch.get_default_device())
    slots = torch.arange(16)
    for layer in range(2):
        pool.write(layer, slots, *(torch.randn(16, 3, 8) for _ in range(2)))
    before = [tensor.clone() for tensor in pool._tensors()]
    moves = [(9, 4), (4, 5), (5, 9), (14, 2)]
    pool.move_tokens(moves)
    pool.move_tokens([])
    come_from = {target: source for source, target in moves}
    for old, new in zip(before, pool._tensors()):
        expected = old.flatten(1, 2)[:, [come_from.get(slot, slot) for slot in range(16)]]
        assert torch.equal(new.flatten(1, 2), expected)
