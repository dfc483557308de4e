"""Small tokenizers in the structure of genuine ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

CORPUS = [
    'The answer is {"label": "fine", "score": 73, "themes": ["hope", "grace"]}',
    'In 1984 there were 12345 houses; the river was 3.14159 miles away. {"colour": "yes"} {"colour": "no"}',
    "the theory of the weather, whether or not they gather together another feather",
    "naïve café, Straße, so there are many, a b c",
    "You are asked: say whether the text names a colour. Answer in JSON.\nuser\nassistant\n",
] * 3
MARK = "▁"
# Those that give every text back byte by byte, and of them those that put a space before a text.
LOSSLESS = ("qwen", "llama3", "gpt2_prefix", "llama2", "mistral", "gemma", "helium")
PREFIXED = ("gpt2_prefix", "llama2", "mistral", "helium", "xlm_r")
# They lack some characters, change some, or change plain text.
LOSSY = ("xlm_r", "nfkc", "word_piece", "lower")
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def make(kind: str, size: int = 420) -> Any:
    """A trained tokenizer; the special tokens of ChatML are 3 and 4 in all of them."""
    tokenizer, trainer = _parts(kind, size)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if "byte_fallback" in tokenizer.to_str():
        tokenizer = _plain_byte_tokens(tokenizer)
    return tokenizer


def _parts(kind: str, size: int) -> tuple[Any, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}" if kind == "llama3" else r"\p{N}"), behavior="isolated")
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    mark = normalizers.Replace(" ", MARK)
    text = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = decoders.Strip(" ", 1, 0)
    common = {"vocab_size": size, "show_progress": False}
    if kind in ("qwen", "llama3", "gpt2_prefix"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen" else None
        prefix = kind == "gpt2_prefix"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        if prefix:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=_SPECIAL, **common)
    if kind == "word_piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer, trainers.WordPieceTrainer(special_tokens=_SPECIAL, **common)
    if kind in ("xlm_r", "helium"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        specials = _SPECIAL
        if kind == "helium":
            specials = _SPECIAL + single
            tokenizer = Tokenizer(models.Unigram(byte_fallback=True))
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
            tokenizer.decoder = decoders.Sequence([*text, strip])
        return tokenizer, trainers.UnigramTrainer(special_tokens=specials, unk_token="<unk>", **common)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    first = {"nfkc": [normalizers.NFKC()], "lower": [normalizers.Lowercase()]}.get(kind, [])
    if kind == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        before = [] if kind == "gemma" else [normalizers.Prepend(MARK)]
        tokenizer.normalizer = normalizers.Sequence([*first, *before, mark])
    tokenizer.decoder = decoders.Sequence(text if kind == "gemma" else [*text, strip])
    return tokenizer, trainers.BpeTrainer(special_tokens=_SPECIAL + single, **common)


def _plain_byte_tokens(tokenizer: Any) -> Any:
    """As in genuine files, the tokens of single bytes are in the vocabulary and no added tokens."""
    from tokenizers import Tokenizer

    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in _SPECIAL]
    if raw["model"]["type"] == "Unigram":
        raw["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(raw))


def spelled(tokenizer: Any, ids: Sequence[int]) -> bytes:
    from mlx_distill.losses import token_bytes

    tokens = token_bytes(tokenizer)
    return b"".join(tokens[i] for i in ids)
