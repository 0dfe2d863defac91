"""The embedded model's tokenizer: byte-level BPE, one token for each digit, no merges across words."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from text_generation_server.embedded_model.recipe.example import CHAT_END, PLAIN_END

VOCAB_SIZE = 3072

SPECIAL_TOKENS = (PLAIN_END, "<|im_start|>", CHAT_END)
"""Ids 0, 1, 2. The first also begins a plain prompt and pads."""
MARKERS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>")
"""One token each, but text: whoever reads the answer must see them."""

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": PLAIN_END,
    "eos_token": CHAT_END,
    "pad_token": PLAIN_END,
    "model_max_length": 2048,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}

# A capitalised word never holds the space before it. So a name is the same tokens at the beginning of a text, inside a
# sentence and in JSON quotes, and a small model can copy it from one place to the other.
_PIECES = "|".join(
    (
        r"\p{N}",
        r" ?\p{Ll}+",
        r"\p{Lu}\p{Ll}+",
        r"\p{Lu}+(?!\p{Ll})",
        r"[\p{L}\p{M}]",
        r" [-+*/=] (?=\p{N})",
        r" ?[^\s\p{L}\p{N}]",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer whose 3,072 tokens hold all 256 bytes, so that any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *MARKERS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PLAIN_END} $A",
        pair=f"{PLAIN_END} $A $B",
        special_tokens=[(PLAIN_END, SPECIAL_TOKENS.index(PLAIN_END))],
    )
    # the trainer marks all of them special; this takes the mark off again, and only a tokenizer made anew heeds it
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return Tokenizer.from_str(tokenizer.to_str())
