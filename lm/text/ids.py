"""Text that is ids: for models that came without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm.errors import UserError, check
from lm.text.base import META_FILE, Tokenizer, check_id, fingerprint_of, one_line


class IdsTokenizer(Tokenizer):
    """Ids in, ids out: its texts are token ids in decimal, with spaces between, such as `15496 995`."""

    def __init__(self, vocab_size: int, *, eos_id: int = -1, bos_id: int = -1, pad_id: int | None = None):
        """Makes one.

        Args:
          vocab_size: how many ids there are.
          eos_id: the id that ends a text; -1 = not known.
          bos_id: the id that begins one; -1 = as `eos_id`.
          pad_id: the id that fills rows, if it is known.
        """
        self.vocab_size, self.eos_id, self.pad_id = vocab_size, eos_id, pad_id
        self.bos_id = eos_id if bos_id < 0 else bos_id
        self.special_tokens = {}

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`. Raises `UserError` for a text that is not ids of the vocabulary."""
        parts = text.split()
        wrong = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
        check(
            wrong is None,
            f"this model came without a tokenizer, so its texts are token ids, such as '15496 995'; found {wrong!r}",
        )
        ids = [int(part) for part in parts]
        for i in ids:
            check_id(i, self.vocab_size)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return " ".join(map(str, ids))

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`."""
        check_id(token_id, self.vocab_size)
        return str(token_id)

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"kind": "ids", **self._settings()}
        (folder / META_FILE).write_text(json.dumps(meta) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return fingerprint_of("ids", json.dumps(self._settings(), sort_keys=True))

    def _settings(self) -> dict[str, int | None]:
        return {"vocab_size": self.vocab_size, "eos_id": self.eos_id, "bos_id": self.bos_id, "pad_id": self.pad_id}


def load_ids(folder: Path) -> IdsTokenizer:
    """What `IdsTokenizer.save` wrote. Raises `UserError` if it is damaged."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        del meta["kind"]
        return IdsTokenizer(**meta)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from None
