"""Readers of lesson 6."""

import itertools
import math

import torch

from tests.course.readers import wrong


@wrong("serving.latencies")
def the_longest_gap(arrival, token_times):
    gaps = [b - a for a, b in itertools.pairwise(token_times)]
    return token_times[0] - arrival, max(gaps, default=0.0)


@wrong("serving.latencies")
def tokens_per_second(arrival, token_times):
    seconds = token_times[-1] - token_times[0]
    return token_times[0] - arrival, (len(token_times) - 1) / seconds if seconds else 0.0


@wrong("serving.latencies")
def simultaneous_tokens_have_no_gap(arrival, token_times):
    gaps = [b - a for a, b in itertools.pairwise(token_times) if b > a]
    return token_times[0] - arrival, sum(gaps) / len(gaps) if gaps else 0.0


@wrong("serving.latencies")
def a_single_token_waits_for_itself(arrival, token_times):
    first = token_times[0] - arrival
    gaps = [b - a for a, b in itertools.pairwise(token_times)]
    return first, sum(gaps) / len(gaps) if gaps else first


@wrong("serving.max_sequences")
def weights_for_every_sequence(memory, weights, kv_bytes_per_token, block_size, length):
    blocks = math.ceil(length / block_size)
    return memory // (weights + blocks * block_size * kv_bytes_per_token)


@wrong("serving.max_sequences", "tokens instead of whole blocks")
def a_sequence_as_long_as_it_is(memory, weights, kv_bytes_per_token, block_size, length):
    return max(0, memory - weights) // kv_bytes_per_token // block_size * block_size // length


@wrong("serving.max_sequences")
def blocks_that_fit(memory, weights, kv_bytes_per_token, block_size, length):
    return max(0, memory - weights) // (kv_bytes_per_token * block_size)


@wrong("serving.max_sequences")
def always_room_for_one(memory, weights, kv_bytes_per_token, block_size, length):
    one = math.ceil(length / block_size) * block_size * kv_bytes_per_token
    return max(1, (memory - weights) // one)


@wrong("serving.top_p", "the nucleus taken before the temperature", ("multiplied by",))
def nucleus_before_temperature(logits, temperature, p):
    probabilities = logits.softmax(-1)
    ordered, index = probabilities.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < p, logits[index], -math.inf)
    return torch.zeros_like(probabilities).scatter(0, index, (kept / temperature).softmax(-1))


@wrong("serving.top_p")
def a_share_of_the_most_likely(logits, temperature, p):
    probs = (logits / temperature).softmax(-1)
    kept = torch.where(probs >= p * probs.max(), probs, 0.0)
    return kept / kept.sum()


@wrong("serving.top_p")
def a_share_of_the_vocabulary(logits, temperature, p):
    probs = (logits / temperature).softmax(-1)
    count = math.ceil(p * len(probs))
    top = probs.topk(count)
    out = torch.zeros_like(probs)
    out[top.indices] = top.values / top.values.sum()
    return out


@wrong("serving.top_p")
def one_more_than_it_takes(logits, temperature, p):
    probs = (logits / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    total, out = 0.0, torch.zeros_like(probs)
    for i in order:
        out[i] = probs[i]
        if total >= p:
            break
        total += probs[i].item()
    return out / out.sum()


@wrong("serving.top_p")
def in_the_order_of_the_vocabulary(logits, temperature, p):
    probs = (logits / temperature).softmax(-1)
    kept = torch.where(probs.cumsum(0) - probs < p, probs, 0.0)
    return kept / kept.sum()


@wrong("serving.admit")
def the_shortest_first(waiting, free_blocks, running, max_running, block_size):
    out = []
    for i in sorted(range(len(waiting)), key=lambda i: waiting[i]):
        need = math.ceil(waiting[i] / block_size)
        if need <= free_blocks and running + len(out) < max_running:
            free_blocks -= need
            out.append(i)
    return sorted(out)


@wrong("serving.admit")
def their_lengths(waiting, free_blocks, running, max_running, block_size):
    out = []
    for length in waiting:
        need = math.ceil(length / block_size)
        if need > free_blocks or running + len(out) >= max_running:
            break
        free_blocks -= need
        out.append(length)
    return out


@wrong("serving.admit")
def blocks_shared_between_prompts(waiting, free_blocks, running, max_running, block_size):
    out, tokens = [], 0
    for i, length in enumerate(waiting):
        tokens += length
        if math.ceil(tokens / block_size) > free_blocks or running + len(out) >= max_running:
            break
        out.append(i)
    return out


@wrong("serving.admit")
def a_block_kept_in_reserve(waiting, free_blocks, running, max_running, block_size):
    out = []
    for i, length in enumerate(waiting):
        need = math.ceil(length / block_size)
        if need >= free_blocks or running + len(out) >= max_running:
            break
        free_blocks -= need
        out.append(i)
    return out


@wrong("serving.chunked_prefill")
def equal_shares(decoding, prompts, budget):
    left = max(budget - decoding, 0)
    return [min(rest, left // len(prompts)) for rest in prompts]


@wrong("serving.chunked_prefill")
def the_shortest_prompt_first(decoding, prompts, budget):
    left, out = max(budget - decoding, 0), [0] * len(prompts)
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        out[i] = min(prompts[i], left)
        left -= out[i]
    return out


@wrong("serving.chunked_prefill", "the decoding sequences forgotten")
def prompts_before_those_that_decode(decoding, prompts, budget):
    out = []
    for rest in prompts:
        out.append(min(rest, budget - sum(out)))
    return out


@wrong("serving.chunked_prefill")
def only_the_pieces_of_this_step(decoding, prompts, budget):
    left, out = budget - decoding, []
    for rest in prompts:
        if left <= 0:
            break
        out.append(min(rest, left))
        left -= out[-1]
    return out


@wrong("serving.preempt")
def the_largest_first(running, needed, free_blocks):
    out = []
    for name, held in sorted(running[1:], key=lambda r: -r[1]):
        if free_blocks >= needed:
            break
        free_blocks += held
        out.append(name)
    return out


@wrong("serving.preempt")
def nobody_if_it_does_not_suffice(running, needed, free_blocks):
    out = []
    for name, held in running[:0:-1]:
        if free_blocks >= needed:
            break
        free_blocks += held
        out.append(name)
    return out if free_blocks >= needed else []


@wrong("serving.preempt", "what is free already is not counted")
def what_is_free_not_counted(running, needed, free_blocks):
    out, given = [], 0
    for name, held in running[:0:-1]:
        if given >= needed:
            break
        given += held
        out.append(name)
    return out


@wrong("serving.preempt")
def in_order_of_arrival(running, needed, free_blocks):
    last = len(running)
    while last > 1 and free_blocks < needed:
        last -= 1
        free_blocks += running[last][1]
    return [name for name, _ in running[last:]]


@wrong("serving.continuous_batching")
def a_place_is_free_in_the_same_step(requests, max_running):
    free, out = [0] * max_running, []
    for arrival, tokens in requests:
        place = free.index(min(free))
        start = max(arrival, free[place])
        out.append(start + tokens - 1)
        free[place] = start + tokens - 1
    return out


@wrong("serving.continuous_batching", "everything a step late")
def admitted_the_step_after(requests, max_running):
    free, out = [0] * max_running, []
    for arrival, tokens in requests:
        place = free.index(min(free))
        start = max(arrival + 1, free[place])
        out.append(start + tokens - 1)
        free[place] = start + tokens
    return out


@wrong("serving.continuous_batching", "how long instead of when")
def how_long_each_one_takes(requests, max_running):
    free, out = [0] * max_running, []
    for arrival, tokens in requests:
        place = free.index(min(free))
        start = max(arrival, free[place])
        free[place] = start + tokens
        out.append(start + tokens - arrival)
    return out


@wrong("serving.continuous_batching")
def places_in_turn(requests, max_running):
    free, out = [0] * max_running, []
    for i, (arrival, tokens) in enumerate(requests):
        place = i % max_running
        start = max(arrival, free[place])
        free[place] = start + tokens
        out.append(start + tokens - 1)
    return out


@wrong("serving.goodput")
def the_share_of_kept_promises(requests, ttft, tpot):
    good = [r for r in requests if r[1] - r[0] <= ttft and r[2] - r[1] <= tpot * (r[3] - 1)]
    return len(good) / len(requests)


@wrong("serving.goodput")
def tokens_of_kept_promises(requests, ttft, tpot):
    good = [r[3] for r in requests if r[1] - r[0] <= ttft and r[2] - r[1] <= tpot * (r[3] - 1)]
    return sum(good) / (max(r[2] for r in requests) - min(r[0] for r in requests))


@wrong("serving.goodput")
def the_time_of_the_kept_ones(requests, ttft, tpot):
    good = [r for r in requests if r[1] - r[0] <= ttft and r[2] - r[1] <= tpot * (r[3] - 1)]
    return len(good) / (max(r[2] for r in good) - min(r[0] for r in good)) if good else 0.0


@wrong("serving.goodput")
def less_than_promised(requests, ttft, tpot):
    good = [r for r in requests if r[1] - r[0] < ttft and (r[3] == 1 or r[2] - r[1] < tpot * (r[3] - 1))]
    return len(good) / (max(r[2] for r in requests) - min(r[0] for r in requests))


@wrong("serving.goodput")
def the_wait_is_part_of_the_mean(requests, ttft, tpot):
    good = [r for r in requests if r[1] - r[0] <= ttft and (r[2] - r[0]) / r[3] <= tpot]
    return len(good) / (max(r[2] for r in requests) - min(r[0] for r in requests))


@wrong("serving.ring_bytes", "half of what is sent")
def the_first_half_alone(tokens, hidden, layers, itemsize, processes):
    piece = tokens * hidden * itemsize // processes
    return 2 * layers * (processes - 1) * piece


@wrong("serving.ring_bytes")
def a_round_for_every_process(tokens, hidden, layers, itemsize, processes):
    piece = tokens * hidden * itemsize // processes
    return 2 * layers * 2 * processes * piece


@wrong("serving.ring_bytes", "whole messages")
def bytes_of_all_processes(tokens, hidden, layers, itemsize, processes):
    return 2 * layers * 2 * (processes - 1) * tokens * hidden * itemsize


@wrong("serving.ring_bytes")
def the_weights_travel(tokens, hidden, layers, itemsize, processes):
    return 2 * layers * 2 * (processes - 1) * hidden * hidden * itemsize // processes
