"""`bench.make_model`: every id has a text, and no sequence ends by itself."""

import torch
from bench.make_model import END_OF_TEXT_ID, VOCAB_SIZE, Shape, make_weights, train_tokenizer

TINY = Shape(layers=2, hidden=16, heads=2, kv_heads=1, intermediate=32)


def test_the_vocabulary_is_exact_even_when_the_text_is_short() -> None:
    tokenizer = train_tokenizer(iter(["a short text, a short text"]), vocab_size=280)
    assert tokenizer.get_vocab_size() == 280
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(280))
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT_ID


def test_text_comes_back_unchanged() -> None:
    tokenizer = train_tokenizer(iter(["some text"]), vocab_size=280)
    text = "def f(x):\n\treturn 'é\U0001f600'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_weights_are_repeatable_bfloat16_and_never_end_a_sequence() -> None:
    model = make_weights(TINY, seed=1)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[-1] == VOCAB_SIZE
    assert logits.dtype is torch.bfloat16
    assert (logits.argmax(-1) != END_OF_TEXT_ID).all()
    again = make_weights(TINY, seed=1).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
