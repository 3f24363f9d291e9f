"""Trains a byte-level BPE tokenizer of Qwen's kind and writes it as a Hugging Face directory.

The pre-tokeniser, the byte alphabet and the special tokens are Qwen3's, so that all that follows treats the
tiny model and a real Qwen3 alike. HER's tags are ordinary text for both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from her_nemo.data.text_encoder import QWEN_SPLIT
from her_nemo.roleplay.prompt import CHAT_TEMPLATE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains on `texts` and saves to `out_dir`.

    `vocab_size` counts the special tokens, which have the lowest ids, and the 256 bytes. When the texts offer
    fewer merges than that, the tokenizer is smaller; a model may still round its vocabulary up.
    Raises ValueError when `vocab_size` cannot hold the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=not token.endswith("think>")) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(out_dir))
    return fast


def extend_tokenizer(source: str | Path, out_dir: str | Path, tokens: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of `source` with `tokens` as entries of their own after all others, saved to `out_dir`.

    No other text is encoded differently: a token that is a word is only found as a whole word.
    """
    fast = PreTrainedTokenizerFast.from_pretrained(str(source))
    added = [
        AddedToken(token, single_word=token.isidentifier(), normalized=False, special=False)
        for token in tokens
    ]
    fast.add_tokens(added)
    fast.save_pretrained(str(out_dir))
    return fast
