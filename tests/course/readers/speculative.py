"""Readers of lesson 5."""

import torch

from optinfer.course.exercises.speculative import pick
from tests.course.readers import wrong


@wrong("speculative.expected_tokens")
def tokens_until_the_first_rejection(alpha, gamma):
    return 1 / (1 - alpha) if alpha < 1 else gamma + 1.0


@wrong("speculative.expected_tokens")
def all_or_only_one(alpha, gamma):
    return alpha**gamma * (gamma + 1) + (1 - alpha**gamma)


@wrong("speculative.expected_tokens")
def powers_up_to_the_drafts_length_twice(alpha, gamma):
    accepted = sum(i * alpha**i * (1 - alpha) for i in range(gamma + 1))
    return accepted + 1


@wrong("speculative.expected_tokens")
def whole_tokens(alpha, gamma):
    return round(sum(alpha**i for i in range(gamma + 1)))


@wrong("speculative.acceptance", None, ("came back unchanged", "usually means"))
def the_difference(p, q):
    return (p - q).abs()


@wrong("speculative.acceptance", "the whole difference instead of half")
def one_minus_the_whole_difference(p, q):
    return (1 - (p - q).abs().sum(-1)).clamp(min=0)


@wrong("speculative.acceptance")
def the_drafts_favourite_token(p, q):
    best = q.argmax(-1, keepdim=True)
    return (p.gather(-1, best) / q.gather(-1, best)).clamp(max=1).squeeze(-1)


@wrong("speculative.acceptance")
def weighted_by_the_target(p, q):
    return (p * torch.minimum(torch.ones_like(p), p / q.clamp(min=1e-30))).sum(-1)


@wrong("speculative.residual", "the absolute difference", ("came back unchanged", "usually means: not normalized"))
def difference_without_sign(p, q):
    left = abs(p - q)
    return left / left.sum() if left.sum() > 0 else p.clone()


@wrong("speculative.residual")
def a_softmax_of_the_difference(p, q):
    return (p - q).clamp(min=0).softmax(-1)


@wrong("speculative.residual")
def what_the_draft_does_not_say(p, q):
    left = p * (1 - q)
    return left / left.sum()


@wrong("speculative.residual")
def target_tokens_the_draft_never_has(p, q):
    left = torch.where(p > q, p, 0.0)
    return left / left.sum() if left.sum() > 0 else p.clone()


@wrong("speculative.residual")
def divided_by_the_drafts_share(p, q):
    left = (p / q.clamp(min=1e-9) - 1).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else p.clone()


@wrong("speculative.greedy_verify")
def all_tokens_or_none(draft, choices):
    return [*draft, choices[-1]] if draft == choices[:-1] else [choices[0]]


@wrong("speculative.greedy_verify")
def choices_belong_to_the_token_before(draft, choices):
    out = []
    for i, token in enumerate(draft):
        if token != choices[i + 1]:
            return [*out, choices[i + 1]]
        out.append(token)
    return [*out, choices[-1]]


@wrong("speculative.greedy_verify")
def how_many_are_right(draft, choices):
    n = 0
    for a, b in zip(draft, choices):
        if a != b:
            break
        n += 1
    return n + 1


@wrong("speculative.greedy_verify")
def the_targets_choices_throughout(draft, choices):
    return list(choices)


@wrong("speculative.greedy_verify")
def the_last_choice_behind_what_is_accepted(draft, choices):
    out = []
    for a, b in zip(draft, choices):
        if a != b:
            break
        out.append(a)
    return [*out, choices[-1]]


@wrong("speculative.rejection_sample")
def going_on_behind_a_correction(draft, q, p, u, u_last):
    out = []
    for i, token in enumerate(draft):
        if u[i] < p[i, token] / q[i, token]:
            out.append(token)
        else:
            left = torch.clamp(p[i] - q[i], min=0)
            out.append(pick(left if left.sum() > 0 else p[i], u_last))
    if out == draft:
        out.append(pick(p[-1], u_last))
    return out


@wrong("speculative.rejection_sample")
def the_same_number_for_the_correction(draft, q, p, u, u_last):
    for i, token in enumerate(draft):
        if u[i] >= p[i, token] / q[i, token]:
            left = torch.clamp(p[i] - q[i], min=0)
            return [*draft[:i], pick(left if left.sum() > 0 else p[i], u[i])]
    return [*draft, pick(p[-1], u_last)]


@wrong("speculative.rejection_sample")
def accepted_by_the_target_alone(draft, q, p, u, u_last):
    for i, token in enumerate(draft):
        if u[i] >= p[i, token]:
            left = torch.clamp(p[i] - q[i], min=0)
            return [*draft[:i], pick(left if left.sum() > 0 else p[i], u_last)]
    return [*draft, pick(p[-1], u_last)]


@wrong("speculative.rejection_sample")
def the_rejected_token_forbidden(draft, q, p, u, u_last):
    for i, token in enumerate(draft):
        if u[i] >= p[i, token] / q[i, token]:
            left = p[i].clone()
            left[token] = 0
            return [*draft[:i], pick(left, u_last)]
    return [*draft, pick(p[-1], u_last)]


@wrong("speculative.prompt_lookup")
def the_longest_run_or_nothing(tokens, max_ngram, num_draft):
    run = tokens[-max_ngram:]
    for end in range(len(tokens) - 1, len(run) - 1, -1):
        if tokens[end - len(run) : end] == run:
            return tokens[end : end + num_draft]
    return []


@wrong("speculative.prompt_lookup", "short runs first")
def the_latest_place_of_any_length(tokens, max_ngram, num_draft):
    for end in range(len(tokens) - 1, 0, -1):
        for n in range(min(max_ngram, end), 0, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + num_draft]
    return []


@wrong("speculative.prompt_lookup")
def what_came_before(tokens, max_ngram, num_draft):
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[max(start - num_draft, 0) : start]
    return []


@wrong("speculative.prompt_lookup", "the commonest continuation")
def the_commonest_continuation(tokens, max_ngram, num_draft):
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        found = [tokens[i + n : i + n + num_draft] for i in range(len(tokens) - n) if tokens[i : i + n] == tokens[-n:]]
        if found:
            return max(found, key=found.count)
    return []


def _tokens(alpha, gamma):
    return sum(alpha**i for i in range(gamma + 1))


@wrong("speculative.best_length")
def the_rate_instead_of_the_length(alpha, draft_cost, verify_cost):
    return max(_tokens(alpha, g) / (g * draft_cost + v) for g, v in enumerate(verify_cost))


@wrong("speculative.best_length")
def lengths_counted_from_one(alpha, draft_cost, verify_cost):
    rates = [_tokens(alpha, g) / (g * draft_cost + v) for g, v in enumerate(verify_cost)]
    return 1 + rates.index(max(rates))


@wrong("speculative.best_length", "stopping at the first length that does not pay")
def until_the_rate_falls_once(alpha, draft_cost, verify_cost):
    best = 0
    rates = [_tokens(alpha, g) / (g * draft_cost + v) for g, v in enumerate(verify_cost)]
    while best + 1 < len(rates) and rates[best + 1] > rates[best] * (1 + 1e-9):
        best += 1
    return best


@wrong("speculative.best_length")
def the_bonus_is_not_counted(alpha, draft_cost, verify_cost):
    rates = [(_tokens(alpha, g) - 1) / (g * draft_cost + v) for g, v in enumerate(verify_cost)]
    return rates.index(max(rates))


@wrong("speculative.in_the_model", "a pass for every token")
def a_pass_for_each_drafted_token(target, draft, prompt, gamma, max_tokens, eos):
    out = []
    while len(out) < max_tokens:
        for token in draft(prompt + out, gamma) or [-1]:
            said = target(prompt + out)[-1]
            out.append(said)
            if said == eos or len(out) == max_tokens:
                return out
            if said != token:
                break
    return out


@wrong("speculative.in_the_model")
def the_end_is_not_part_of_the_text(target, draft, prompt, gamma, max_tokens, eos):
    out = []
    while len(out) < max_tokens:
        proposed = draft(prompt + out, gamma)
        said = target(prompt + out + proposed)[len(prompt) + len(out) - 1 :]
        n = 0
        while n < len(proposed) and proposed[n] == said[n]:
            n += 1
        for token in said[: n + 1]:
            if token == eos or len(out) == max_tokens:
                return out
            out.append(token)
    return out


@wrong("speculative.in_the_model")
def no_bonus_behind_a_right_draft(target, draft, prompt, gamma, max_tokens, eos):
    out = []
    while len(out) < max_tokens:
        proposed = draft(prompt + out, gamma)
        said = target(prompt + out + proposed)[len(prompt) + len(out) - 1 :]
        n = 0
        while n < len(proposed) and proposed[n] == said[n]:
            n += 1
        for token in said[: max(1, min(n + 1, len(proposed)))]:
            out.append(token)
            if token == eos or len(out) == max_tokens:
                return out
    return out


@wrong("speculative.in_the_model")
def with_the_prompt_in_front(target, draft, prompt, gamma, max_tokens, eos):
    text = list(prompt)
    while len(text) < len(prompt) + max_tokens:
        proposed = draft(text, gamma)
        said = target(text + proposed)[len(text) - 1 :]
        for i in range(len(proposed) + 1):
            text.append(said[i])
            if said[i] == eos or len(text) == len(prompt) + max_tokens:
                return text
            if i == len(proposed) or proposed[i] != said[i]:
                break
    return text


@wrong("speculative.tree_mask")
def who_comes_after_me(parents):
    n = len(parents)
    mask = [[i == j for j in range(n)] for i in range(n)]
    for j in range(n - 1, -1, -1):
        for i in range(n):
            if parents[i] == j:
                mask[j] = [a or b for a, b in zip(mask[j], mask[i])]
    return mask


@wrong("speculative.tree_mask")
def everybody_nearer_to_the_text(parents):
    depth = []
    for parent in parents:
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    return [[depth[j] < depth[i] or i == j for j in range(len(parents))] for i in range(len(parents))]


@wrong("speculative.tree_mask")
def siblings_too(parents):
    mask = []
    for i, parent in enumerate(parents):
        row = list(mask[parent]) if parent >= 0 else [False] * len(parents)
        mask.append([seen or (parents[j] == parent and j <= i) for j, seen in enumerate(row)])
    return mask


@wrong("speculative.tree_mask")
def rows_as_long_as_the_way(parents):
    ways = []
    for i, parent in enumerate(parents):
        ways.append([*(ways[parent] if parent >= 0 else []), i])
    return ways


@wrong("speculative.accept_tree")
def what_the_target_says_at_the_node(tokens, parents, target):
    at, out = -1, []
    while True:
        said = target[at] if at >= 0 else target[0]
        out.append(said)
        found = [i for i in range(len(tokens)) if parents[i] == at and tokens[i] == said]
        if not found:
            return out
        at = found[0]


@wrong("speculative.accept_tree")
def the_first_branch_only(tokens, parents, target):
    at, out = -1, []
    while True:
        out.append(target[at + 1])
        children = [i for i, parent in enumerate(parents) if parent == at]
        if not children or tokens[children[0]] != out[-1]:
            return out
        at = children[0]


@wrong("speculative.accept_tree")
def the_nodes_instead_of_their_tokens(tokens, parents, target):
    at, out = -1, []
    while True:
        found = [i for i in range(len(tokens)) if parents[i] == at and tokens[i] == target[at + 1]]
        if not found:
            return out
        at = found[0]
        out.append(at)


@wrong("speculative.accept_tree")
def a_token_further_down(tokens, parents, target):
    at, out = -1, []
    while True:
        out.append(target[at + 1])
        found = {tokens[i]: i for i in range(len(tokens)) if parents[i] >= at}
        if out[-1] not in found or found[out[-1]] <= at:
            return out
        at = found[out[-1]]
