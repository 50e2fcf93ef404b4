"""Training of the kinds that end as a `tokenizer.json`: bpe, unigram, wordpiece, word and char.

Hugging Face's trainers number things in the order of hash tables that differ from run to run. Byte-level BPE is immune,
as its alphabet is given; for the others, what is counted is counted and ordered here, so that the same text gives the
same file: words and characters by frequency, WordPiece's alphabet given beforehand, Unigram's pieces from
SentencePiece's trainer, which splits its work the same way on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lm.errors import check
from lm.text.base import (
    END_OF_TEXT,
    UNKNOWN,
    TokenizerConfig,
    count_chunks,
    cut_between_words,
    first_bytes,
    most_frequent,
)
from lm.text.spm import unigram_pieces
from lm.text.subword import SubwordTokenizer

if TYPE_CHECKING:
    import tokenizers

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TRAINING_PIECE = 1 << 16  # characters; long documents reach the trainer in pieces, so that all cores count

# Characters of scripts that write no spaces: each is a word of its own for kind `word`.
_IDEOGRAPHS = r"\p{Han}\p{Hiragana}\p{Katakana}"
_LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}_]&&[^{_IDEOGRAPHS}]]+"
_WORD = rf"[{_IDEOGRAPHS}]|{_LETTERS}(?:['’]{_LETTERS})*|[^\s]"


def train_subword(config: TokenizerConfig, texts: Iterable[str]) -> SubwordTokenizer:
    """Trains the kinds named above. Raises `UserError` where the text doesn't allow the vocabulary asked for."""
    train = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece, "word": _words, "char": _characters}
    definition = train[config.kind](config, first_bytes(texts, config.training_bytes)).to_str()
    return SubwordTokenizer(definition, kind=config.kind, origin="the trained tokenizer")


def wordpiece(vocabulary: dict[str, int], *, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer around a vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """GPT-2's way from text to a model and back: words with the space before them, in letters that are bytes."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in byte-level vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _bpe(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import models, trainers

    blank = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, *config.special_tokens],
        initial_alphabet=byte_letters(),
        show_progress=False,
    )
    blank.train_from_iterator((piece for text in texts for piece in cut_between_words(text, _TRAINING_PIECE)), trainer)
    return blank


def _unigram(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import models

    special = [END_OF_TEXT, *config.special_tokens]
    words = _count_words(count_chunks(texts), byte_level(models.Unigram()))
    pieces = unigram_pieces(words, vocab_size=config.vocab_size - len(special), alphabet=byte_letters())
    made = byte_level(models.Unigram([*((name, 0.0) for name in special), *pieces]))
    made.add_special_tokens(special)
    return made


def _wordpiece(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    words = _count_words(count_chunks(texts), wordpiece({"[UNK]": 0}, lowercase=config.lowercase))
    special = [*BERT_SPECIAL, *config.special_tokens]
    # A character takes up to two tokens, `c` where a word begins and `##c` inside it.
    known = set(most_frequent(_count_characters(words), room=(config.vocab_size - len(special)) // 2, min_count=1))
    inside = {f"##{c}" for word in words for c in word[1:] if c in known}
    blank = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    blank.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=[*special, *sorted(inside)], show_progress=False
    )
    whole = ((word, count) for word, count in sorted(words.items()) if known.issuperset(word))
    blank.train_from_iterator(_repeated(whole), trainer)

    made = wordpiece(blank.get_vocab(with_added_tokens=True), lowercase=config.lowercase)
    made.add_special_tokens([name for name in special if name != "[UNK]"])  # what is unknown shows in decoded text
    return made


def _words(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, pre_tokenizers

    split: pre_tokenizers.PreTokenizer
    if config.splitting == "whitespace":
        split = pre_tokenizers.WhitespaceSplit()
    else:
        split = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    return _word_level(config, count_chunks(texts), split)


def _characters(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, pre_tokenizers

    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    made = _word_level(config, characters, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"))
    made.decoder = decoders.Fuse()
    return made


def _word_level(
    config: TokenizerConfig, chunks: Counter[str], split: tokenizers.pre_tokenizers.PreTokenizer
) -> tokenizers.Tokenizer:
    """A vocabulary of whole words: the unknown one, the known by frequency, then the special tokens.

    Special tokens stand outside the model's vocabulary, where no word of a text is looked up.
    """
    import tokenizers
    from tokenizers import models, normalizers

    special = [END_OF_TEXT, *config.special_tokens]
    made = tokenizers.Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    made.pre_tokenizer = split
    if config.lowercase:
        made.normalizer = normalizers.Lowercase()
    words = _count_words(chunks, made)
    words.pop(UNKNOWN, None)  # corpora such as the Penn Treebank spell it out
    for name in special:  # a word of the text that is spelled like one could not have an id beside it
        words.pop(name, None)
    kept = most_frequent(words, room=config.vocab_size - 1 - len(special), min_count=config.min_count)
    check(
        kept,
        f"no word of the training text occurs {config.min_count} times (tokenizer.min_count); lower it or add text",
    )
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *kept])}
    made.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    made.add_special_tokens(special)
    return made


def _count_words(chunks: Counter[str], like: tokenizers.Tokenizer) -> Counter[str]:
    """The words that a tokenizer's own normaliser and splitting find in chunks of text, counted."""
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        normal = chunk if like.normalizer is None else like.normalizer.normalize_str(chunk)
        for word, _ in like.pre_tokenizer.pre_tokenize_str(normal):
            words[word] += count
    return words


def _count_characters(words: Counter[str]) -> Counter[str]:
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    return characters


def _repeated(words: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Each word as often as it was counted, in texts of moderate length: the trainer takes no counts."""
    for word, count in words:
        step = max(_TRAINING_PIECE // (len(word) + 1), 1)
        while count > 0:
            yield " ".join([word] * min(count, step))
            count -= step
