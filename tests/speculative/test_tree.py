"""Draft trees: the mask is ancestry, the law is the target's, the text is plain decoding's."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from optinfer.kv_cache import paged_attention
from optinfer.speculative import DraftTree, LookupTree, TreeDraft, accept_drawn, accept_path, drawn_law, tree_decoding


@st.composite
def trees(draw, vocab: int = 9) -> DraftTree:
    chains = draw(st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=4), max_size=5))
    return DraftTree.of_chains(chains)


@given(trees())
def test_everyone_sees_ancestors_and_oneself(tree: DraftTree) -> None:
    for node in range(len(tree)):
        line, at = {0}, node
        while at >= 0:
            line.add(at + 1)
            at = tree.parents[at]
        assert set(tree.mask()[node + 1].nonzero().flatten().tolist()) == line
        assert tree.depths[node] == len(line) - 1
    assert tree.mask()[0].tolist() == [True] + [False] * len(tree)


def test_shared_beginnings_are_one_node() -> None:
    tree = DraftTree.of_chains([[1, 2, 3], [1, 4], [1, 2, 5], [6]])
    assert tree.tokens == [1, 2, 3, 4, 5, 6] and tree.parents == [-1, 0, 1, 0, 1, -1]
    assert DraftTree.of_chains([[1, 2, 3], [4, 5]], most=4).tokens == [1, 2, 3, 4]
    for tokens, parents, message in [
        ([1], [0], "behind its parent"),
        ([1, 1], [-1, -1], "same token"),
        ([1], [], "parents"),
    ]:
        with pytest.raises(ValueError, match=message):
            DraftTree(tokens, parents)


def test_a_chain_is_a_tree_of_one_branch() -> None:
    chain = DraftTree.chain(iter([5, 5, 6]))
    assert chain == DraftTree.of_chains([[5, 5, 6]]) and chain.depths == [1, 2, 3]
    tree = DraftTree.of_chains([[1, 2], [3]])
    assert tree.branches and not chain.branches and not DraftTree().branches and not tree.first(2).branches
    assert tree.first(9) is tree and tree.first(2) == DraftTree.chain([1, 2]) and len(tree.first(0)) == 0
    draft = TreeDraft()
    assert draft.as_tree([1, 2, 3, -1, 0, -1]) == DraftTree([1, 2, 3], [-1, 0, -1])
    assert draft.as_tree([1, -1, -1, -1, 0, 0]) == DraftTree.chain([1]) and not draft.as_tree([])


def test_path() -> None:
    tree = DraftTree.of_chains([[1, 2], [3, 4]])
    assert accept_path(tree, [3, 9, 9, 4, 7]) == ([2, 3], 7)
    assert accept_path(tree, [5, 0, 0, 0, 0]) == ([], 5)


laws = st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=4, max_size=4).filter(lambda x: sum(x) > 0.1)


@settings(deadline=None, max_examples=60)
@given(laws, laws, st.integers(1, 4))
def test_whatever_is_drawn_the_law_is_the_targets(p: list[float], q: list[float], width: int) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) / sum(x) for x in (p, q))
    torch.testing.assert_close(drawn_law(q, p, width), p, rtol=1e-9, atol=1e-12)


def test_the_sampler_is_the_one_whose_law_was_counted() -> None:
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    counts, accepted, n = torch.zeros(4), 0, 8000
    for _ in range(n):
        drawn = torch.multinomial(q, 2, generator=g).tolist()
        token, place = accept_drawn(drawn, q, p, g)
        assert place is None or drawn[place] == token
        counts[token] += 1
        accepted += place is not None
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 16.3  # chi-square, 3 degrees of freedom, 0.1 %
    assert accepted / n > 1 - float((p - q).clamp_min(0).sum())  # more than one draft would get


def test_the_enumeration_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: the second child is tried against p itself, which does not give up what was refused."""
    from optinfer.speculative import tree

    p, q = torch.tensor([0.1, 0.5, 0.4]).double(), torch.tensor([0.6, 0.3, 0.1]).double()
    assert torch.allclose(drawn_law(q, p, 2), p)
    monkeypatch.setattr(tree, "residual_distribution", lambda q, p: p)
    assert not torch.allclose(drawn_law(q, p, 2), p, atol=1e-2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )).double().eval()  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


class RandomTree:
    """Guesses anything, and now and then what is right."""

    def __init__(self, right: list[int], seed: int):
        self.right, self.rng = right, random.Random(seed)

    def bind(self, target) -> None: ...

    def observe(self, hidden) -> None:
        self.seen = getattr(self, "seen", 0) + hidden.shape[1]

    def propose_tree(self, input_ids):
        assert self.seen == input_ids.shape[1] - 1
        known = self.right[input_ids.shape[1] :][: self.rng.randint(0, 4)]
        chains = [
            [self.rng.randrange(37) for _ in range(self.rng.randint(1, 4))] for _ in range(self.rng.randint(0, 4))
        ]
        return DraftTree.of_chains([*chains, known, [*known[:1], 5, 6]])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_plain_decodings(model, seed: int) -> None:
    prompt = torch.randint(1, 37, (1, 9), generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    out = tree_decoding(model, prompt, RandomTree(plain[0].tolist(), seed), 30)
    assert out.sequences.tolist() == plain.tolist() and sum(out.emitted) == 30
    assert max(out.emitted) > 1 and out.tokens_per_pass > 1
    assert tree_decoding(model, prompt, LookupTree(), 30).sequences.tolist() == plain.tolist()


def test_a_sampled_text_does_not_depend_on_the_tree(model) -> None:
    """One pass, one drawn token per node: the first token's law is the model's whatever is drafted."""
    prompt = torch.randint(1, 37, (1, 5), generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    with torch.no_grad():
        law = model(prompt).logits[0, -1].softmax(-1)
        after = model(torch.cat([prompt, law.argmax().view(1, 1)], 1)).logits[0, -1].softmax(-1)
    g, pairs, n = torch.Generator(torch.get_default_device()).manual_seed(2), torch.zeros(37), 600

    class Always(RandomTree):
        def propose_tree(self, input_ids):
            return DraftTree.of_chains([[int(after.argmax())], [3]])

    for _ in range(n):
        text = tree_decoding(model, prompt, Always([], 0), 2, temperature=1.0, generator=g).sequences[0, 5:].tolist()
        if text[0] == int(law.argmax()):
            pairs[text[1]] += 1
    share, k = pairs / pairs.sum(), int(after.argmax())
    assert abs(float(share[k] - after[k])) < 4 * float((after[k] * (1 - after[k]) / pairs.sum()).sqrt())


@pytest.mark.parametrize("before", [5, 37], ids=["within a tile", "across tiles"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "loops", "triton", "auto"])
def test_tree_mask_through_paged_attention(backend: str, before: int) -> None:
    """Two sequences, one with a tree and one with a chain; the tree's answer is that of each branch on its own."""
    if backend == "loops" and torch.get_default_device().type != "cpu":
        pytest.skip("loops run on a CPU")
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    tree = DraftTree.of_chains([[1, 2], [3], [1, 4, 5], [*range(6, 22)]])
    n, size = len(tree) + 1, 4
    k, v = (torch.randn(40, size, 2, 16, generator=g) for _ in range(2))
    tables = torch.randperm(40, generator=g).view(2, 20)
    q = torch.randn(n + 2, 4, 16, generator=g)
    mask = torch.zeros(n + 2, n, dtype=torch.bool)
    mask[:n], mask[n:, :2] = tree.mask(), torch.ones(2, 2).tril().bool()
    starts = torch.tensor([0, n, n + 2])
    options = {"backend": backend, "query_starts": starts, "max_queries": n}
    out = paged_attention(q, k, v, tables, torch.tensor([before + n, 6]), tree_mask=mask, **options)
    keys, values = (x[tables[0]].flatten(0, 1).repeat_interleave(2, 1) for x in (k, v))
    for row in range(n):
        seen = [*range(before), *(before + j for j in tree.mask()[row].nonzero().flatten().tolist())]
        scores = torch.einsum("hd,thd->ht", q[row], keys[seen]) / 4
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), values[seen])
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
    chain = paged_attention(q[n:], k, v, tables[1:], torch.tensor([6]), query_starts=starts[:2] * 2 // n, max_queries=2)
    torch.testing.assert_close(out[n:], chain, rtol=1e-4, atol=1e-5)
    plain = paged_attention(q, k, v, tables, torch.tensor([before + n, 6]), **options)
    assert not torch.allclose(out[:n], plain[:n], atol=1e-2)  # a mask that is not read would not pass


def test_masks_that_cannot_be() -> None:
    q, k = torch.randn(3, 2, 16), torch.randn(2, 4, 1, 16)
    arguments = (q, k, k, torch.tensor([[0, 1]]), torch.tensor([5]))
    mask = torch.ones(3, 3, dtype=torch.bool)
    options = {"query_starts": torch.tensor([0, 3]), "max_queries": 3}
    for changed, error, message in [
        ({"tree_mask": mask.float()}, TypeError, "tree_mask must be bool"),
        ({"tree_mask": mask[:2]}, ValueError, r"tree_mask must be \[3, 3\]"),
        ({"tree_mask": mask, "window": 4}, ValueError, "tree_mask and window=4 cannot be combined"),
    ]:
        for backend in ("reference", "sdpa", "loops", "triton"):
            with pytest.raises(error, match=message):
                paged_attention(*arguments, backend=backend, **options, **changed)
