"""The factory that every other test stands on."""

import pytest
import torch
from transformers import AutoTokenizer

from tiny_models import FAMILIES, REFUSED, VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES + REFUSED)
def test_models_run_and_are_the_same_for_the_same_seed(family):
    before = torch.random.get_rng_state()
    model = tiny_model(family)
    twin = tiny_model(family)
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters()):
        assert torch.equal(ours, theirs), name
        assert not ours.requires_grad
    tokens = torch.arange(24).view(2, 12)
    logits = model(tokens).logits
    assert logits.shape == (2, 12, VOCAB_SIZE)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, tiny_model(family, seed=1)(tokens).logits)


def test_tokenizer_keeps_any_text_and_survives_saving(tmp_path):
    tokenizer = tiny_tokenizer()
    text = "The singing of the hen, naïve 東京 \n\t 42"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < VOCAB_SIZE
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)
