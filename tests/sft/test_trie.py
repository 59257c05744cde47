from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sft.batch import Layout, collate
from sft.loss import targets
from sft.mask import UNTRAINED, Example
from sft.model import LossModel, trained_parameters
from sft.trie import make_trie

N = UNTRAINED


def trie(ids: list[int], wanted: list[int], starts: list[int], ends: list[int]) -> list[Any]:
    made = make_trie(torch.tensor(ids), torch.tensor(wanted), starts, ends)
    return [made.tokens.tolist(), [(b.first, b.last, b.path.tolist(), b.mask) for b in made.branches]]


def test_common_beginnings_are_computed_once_and_needless_ends_not_at_all() -> None:
    ids = [5, 6, 7, 8, 9, 5, 6, 4, 8, 9]
    tokens, branches = trie(ids, [N, N, 8, N, N, N, N, 8, 9, N], [0, 5], [5, 10])
    assert tokens == [0, 1, 2, 7, 8]
    assert branches[0] == (0, 3, [0, 1, 2], None)
    assert branches[1][:3] == (3, 5, [0, 1, 3, 4])
    assert branches[1][3].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_a_token_that_predicts_a_trained_one_is_shared_with_nobody() -> None:
    tokens, branches = trie([5, 6, 5, 6], [N, 7, N, 8], [0, 2], [2, 4])
    assert tokens == [0, 1, 3]
    assert [branch[2] for branch in branches] == [[0, 1], [0, 2]]


def test_documents_without_a_trained_token_are_left_out_unless_there_is_no_other() -> None:
    assert trie([5, 6, 7, 8], [N, N, 8, N], [0, 2], [2, 4])[0] == [2]
    assert trie([5, 6, 7, 8], [N, N, N, N], [0, 2], [2, 4])[0] == [0, 1]


def base(kind: str) -> Any:
    """A random model of two layers that shares keys and values between heads."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        **({"sliding_window": None} if kind == "Mistral" else {}),
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="sdpa")


def adapted(kind: str, *, branches: bool) -> LossModel:
    """A loss model with an adapter that does something."""
    made = base(kind)
    torch.manual_seed(1)
    model = LossModel(get_peft_model(made, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))
    assert model._branches
    model._branches = branches
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_(0, 0.1)
    return model


def gradients(model: LossModel, rows: list[Example], layout: Layout) -> dict[str, Tensor]:
    """The loss, and the gradient of every adapter weight."""
    batch = collate(rows, layout, 0)
    arrays = (batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask, batch.weights)
    model.zero_grad()
    loss = model(*(None if array is None else torch.tensor(array) for array in arrays))
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def rows(lengths: list[tuple[int, int, int]], *, weighed: bool = False) -> list[Example]:
    """Documents that have `shared` tokens in common, then `prompt` of their own and `answer` trained ones."""
    made = []
    for number, (shared, prompt, answer) in enumerate(lengths):
        draw = torch.Generator().manual_seed(number)
        own = torch.randint(0, 32, (prompt + answer + 1,), generator=draw)
        ids = torch.cat([torch.arange(shared) % 7, own]).int().numpy()
        labels = ids.copy()
        labels[: shared + prompt] = UNTRAINED
        labels[0] = labels[-1] = UNTRAINED
        weights = (labels != UNTRAINED) * (0.5 + number)
        made.append(Example(str(number), ids, labels, weights.astype("float32") if weighed else None))
    return made


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_and_gradients_are_the_whole_packs(kind: str, layout: Layout) -> None:
    batch = rows([(6, 3, 4), (6, 0, 2), (3, 5, 6), (0, 2, 3)], weighed=True)
    whole = gradients(adapted(kind, branches=False), batch, layout)
    quick = gradients(adapted(kind, branches=True), batch, layout)
    for name, value in whole.items():
        torch.testing.assert_close(quick[name], value, rtol=1e-4, atol=1e-5, msg=name)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_every_document_has_all_its_tokens_in_order(lengths: list[tuple[int, int, int]]) -> None:
    batch = collate(rows(lengths), "packed", 0)
    ids, wanted = torch.tensor(batch.input_ids), targets(torch.tensor(batch.labels))
    edges = [*(index for index, position in enumerate(batch.position_ids[0]) if position == 0), ids.numel()]
    made = make_trie(ids.flatten(), wanted.flatten(), edges[:-1], edges[1:])
    assert sum(branch.last - branch.first for branch in made.branches) == len(made.tokens)
    assert (wanted.flatten()[made.tokens] != UNTRAINED).sum() == (wanted != UNTRAINED).sum()
    kept = ids.flatten()[made.tokens]
    for branch in made.branches:
        own = int(made.tokens[branch.last - 1])
        start = max(edge for edge in edges if edge <= own)
        assert kept[branch.path].tolist() == ids[0, start : own + 1].tolist()
        assert branch.path[-1] == branch.last - 1


def test_dropout_and_windows_keep_their_own_way() -> None:
    dropping = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules="all-linear")
    assert not LossModel(get_peft_model(base("Llama"), dropping))._branches
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, sliding_window=4)
    config.num_attention_heads = config.num_key_value_heads = 1
    made = MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    plain = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    assert not LossModel(get_peft_model(made, plain))._branches
