"""Tokenizers of the package ``tokenizers``, from their ``tokenizer.json``."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxalign import remote
from jaxalign.files import json_sha256
from jaxalign.vocabularies.base import BaseVocabulary

TOKENIZER_FILE = "tokenizer.json"  # beside a cache, and in a folder of Hugging Face


def tokenizers() -> Any:
    """The package; an ImportError that says how to install it where it is not there."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "A tokenizer.json is read by the package tokenizers, which is not "
            "installed: pip install 'jaxalign[tokenizers]'."
        ) from error
    return tokenizers


class TokenizerVocabulary(BaseVocabulary):
    """A ``tokenizer.json``: byte-level BPE (CodeT5+), Unigram, or any other kind.

    What its template puts before a text (``<s>``) is part of `encode`; the EOS that it
    puts behind is not.

    Args:
      text: of the file.
      pad_id: of padding.
      eos_id: that ends a text.
      start_id: what a decoder reads before the first token.

    Raises:
      ImportError: without the ``tokenizers`` package.
      ValueError: for a text that is no tokenizer, or ids that it lacks.
    """

    extra_ids = 0

    def __init__(self, text: str, pad_id: int, eos_id: int, start_id: int):
        self.text = text
        self.pad_id, self.eos_id, self.start_id = pad_id, eos_id, start_id
        self._load()

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("text", "pad_id", "eos_id", "start_id")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        package = tokenizers()
        try:
            self._model = package.Tokenizer.from_str(self.text)
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"This is no tokenizer.json: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        for name in ("pad_id", "eos_id", "start_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and the tokenizer has "
                    f"{self.vocab_size} ids."
                )
        unknown = (json.loads(self.text).get("model") or {}).get("unk_token")
        self.unk_id = vocabulary.get(unknown or "<unk>", self.pad_id)
        added = self._model.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self._special |= {self.pad_id, self.eos_id}
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        self.fingerprint = json_sha256(self.to_json() | {"sha256": digest})

    def __repr__(self) -> str:
        return f"TokenizerVocabulary({self.vocab_size} ids, EOS {self.eos_id})"

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without EOS."""
        ids = self._model.encode(text).ids
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def piece(self, token: int) -> str:
        """How the tokenizer's own file writes an id."""
        return self._model.id_to_token(token)

    def token_id(self, piece: str) -> int | None:
        """The id that the tokenizer's own file writes so."""
        return self._model.token_to_id(piece)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text behind other text: without what a template puts before it.

        A tokenizer that puts a space before every text is given one space less.
        """
        if not self._of_bytes and text[:1] == " " and text[1:2].strip():
            text = text[1:]
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], final: bool = True) -> str:
        """Text up to the first EOS, special tokens left out.

        Args:
          final: whether they are all. If not, half a character at the end is held back.
        """
        text = self._model.decode(self.until_eos(ids).tolist())
        return text if final else text.rstrip("\ufffd")

    @functools.cached_property
    def _of_bytes(self) -> bool:
        """Whether a token's letters stand for bytes."""
        decoder = json.loads(self.text).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return any(part.get("type") == "ByteLevel" for part in parts)

    def token_bytes(
        self, first: bool = False, special: bool = False
    ) -> list[bytes | None]:
        """What each id spells; None for special ids, which with ``special`` are empty.

        Args:
          first: with nothing before it; where decoding drops a piece's space there.
          special: see above.
        """
        spelt: list[bytes | None] = []
        for i in range(self.vocab_size):
            token = self._model.id_to_token(i)
            if token is None or i in self._special or i == self.unk_id:
                spelt.append(b"" if special else None)
            elif self._of_bytes and all(c in _BYTES for c in token):
                spelt.append(bytes(_BYTES[c] for c in token))
            elif not self._of_bytes and _is_byte(token):
                spelt.append(bytes([int(token[3:5], 16)]))
            else:
                token = token.removeprefix("▁") if first else token
                spelt.append(token.replace("▁", " ").encode("utf-8"))
        return spelt

    def to_json(self) -> dict[str, Any]:
        """A JSON description for :func:`from_json`."""
        ids = {k: getattr(self, k) for k in ("pad_id", "eos_id", "start_id")}
        return {"kind": "tokenizer", "model": TOKENIZER_FILE, "ids": ids}

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes ``tokenizer.json`` into ``directory``."""
        (pathlib.Path(directory) / TOKENIZER_FILE).write_text(self.text, "utf-8")


def tokenizer_file(
    path: str, pad_id: int = 0, eos_id: int = 1, start_id: int = 0
) -> TokenizerVocabulary:
    """The vocabulary of a ``tokenizer.json``, local or in a bucket, for gin files.

    Arguments but ``path`` are those of `TokenizerVocabulary`.
    """
    text = remote.copy(path).read_text("utf-8")
    return TokenizerVocabulary(text, pad_id, eos_id, start_id)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level BPE: printable bytes are themselves (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    return letters | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()
