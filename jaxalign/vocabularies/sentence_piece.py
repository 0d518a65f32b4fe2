"""SentencePiece models as vocabularies."""

from __future__ import annotations

import codecs
import functools
import hashlib
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxalign import remote
from jaxalign.files import json_sha256
from jaxalign.vocabularies.base import EOS_ID, PAD_ID, UNK_ID, BaseVocabulary
from jaxalign.vocabularies.escapes import Escapes

MODEL_FILE = "vocabulary.model"  # the name of a SentencePiece model beside a cache


class SentencePieceVocabulary(BaseVocabulary):
    """A SentencePiece model with sentinels at the end and reversible escaping.

    Args:
      path: the ``.model`` file; local, or remote such as ``gs://`` (which TensorFlow
        or gcsfs reads).
      extra_ids: sentinels ``<extra_id_0>``, ... at the end; the first has the
        highest id, as in T5.
      escape: spell characters that the model cannot hold with ones that it can.
        Sentinels at word starts stay sentinels.
      pad_id: of padding, where the model does not say 0 (MADLAD-400 pads with 1).
      eos_id: that ends a text, where the model does not say 1.

    Raises:
      ValueError: when the model has no padding, EOS or unknown ids, or, unless those
        are given, others than 0, 1 and 2.
    """

    def __init__(
        self,
        path: str,
        extra_ids: int = 100,
        escape: bool = True,
        pad_id: int = PAD_ID,
        eos_id: int = EOS_ID,
    ):
        self.path = str(path)
        self.extra_ids = extra_ids
        self.escape = escape
        self.pad_id, self.eos_id = pad_id, eos_id
        self.model_bytes = _read_bytes(self.path)
        self._load()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which may not see the model's file."""
        names = ("path", "extra_ids", "escape", "pad_id", "eos_id", "model_bytes")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        """The model from its bytes, and the escapes that it needs."""
        import sentencepiece  # byte models need none

        numbers = reversed(range(self.extra_ids))
        sentinels = b"".join(_serialized_piece(f"▁<extra_id_{i}>") for i in numbers)
        # Serialised protos concatenate: this appends to the model's list of pieces.
        self._model = sentencepiece.SentencePieceProcessor(
            model_proto=self.model_bytes + sentinels
        )
        self._sentinels = sentinels
        pad, eos = self._model.pad_id(), self._model.eos_id()
        self.unk_id = self._model.unk_id()
        own = (self.pad_id, self.eos_id) != (PAD_ID, EOS_ID)
        fits = eos == self.eos_id and pad in (-1, self.pad_id) and self.unk_id >= 0
        if not (fits if own else (pad, eos, self.unk_id) == (PAD_ID, EOS_ID, UNK_ID)):
            raise ValueError(
                f"{self.path} has (pad, EOS, unknown) ids {(pad, eos, self.unk_id)}, "
                f"expected ({self.pad_id}, {self.eos_id}, 2) as in T5: train it with "
                "pad_id=0, eos_id=1, unk_id=2, bos_id=-1."
            )
        self.vocab_size = self._model.get_piece_size()
        self._escapes = None
        if self.escape:
            model = self._model
            held = Escapes(lambda s: model.decode(model.encode(s)) == s, self.extra_ids)
            if held.opener:
                self._escapes, self.escapes = held, (held.opener, held.letters)
        self.fingerprint = json_sha256(
            self.to_json() | {"sha256": hashlib.sha256(self.model_bytes).hexdigest()}
        )

    def __repr__(self) -> str:
        return (
            f"SentencePieceVocabulary({self.path!r}, extra_ids={self.extra_ids}, "
            f"escape={self.escape})"
        )

    def piece(self, token: int) -> str:
        """How the model's own file writes an id."""
        return self._model.id_to_piece(token)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text behind other text, to which no space is added.

        Where they cannot spell it, as without escapes, they decode to something else.
        """
        if text[:1] == " " and text[1:2].strip():
            return self.encode(text[1:])  # that of the first piece
        return self._inside.encode(self.escape_text(text))

    @functools.cached_property
    def _inside(self) -> Any:
        """The model that does not put a space before a text."""
        import sentencepiece

        # Appended fields replace earlier ones: normalizer_spec.add_dummy_prefix is 0.
        return sentencepiece.SentencePieceProcessor(
            model_proto=self.model_bytes + self._sentinels + b"\x1a\x02\x18\x00"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without EOS."""
        escaped = self.escape_text(text)
        ids = self._model.encode(escaped)
        # Normalisers also fold sequences whose characters they would keep one by one
        # (letter + combining accent). ASCII has none.
        doubtful = self._escapes and not escaped.isascii()
        if doubtful and self._model.decode(ids) != escaped:
            ids = self._model.encode(self._escapes.escape(text, strict=True))
        return ids

    def escape_text(self, text: str) -> str:
        """Spells what the model cannot hold with what it can."""
        return self._escapes.escape(text) if self._escapes else text

    def unescape_text(self, text: str, final: bool = True) -> str:
        """Undoes :meth:`escape_text`; see `Escapes.unescape`."""
        return self._escapes.unescape(text, final) if self._escapes else text

    def decode(self, ids: Iterable[int], final: bool = True) -> str:
        """Text up to the first EOS, escapes undone; unknown ids read as ⁇.

        Args:
          final: whether they are all. If not, what further ids may change is held
            back: half a character of byte pieces, and an open escape. What is
            returned then is a prefix of the text of ``ids`` and any that follow.
        """
        kept = self.until_eos(ids)
        kept = np.where(kept < self.vocab_size, kept, self.unk_id).tolist()
        if not final:
            kept = kept[: len(kept) - self._half_a_character(kept)]
        return self.unescape_text(self._model.decode(kept), final)

    def _half_a_character(self, ids: list[int]) -> int:
        """How many byte pieces at the end are the beginning of a character."""
        raw = b""
        for i in reversed(ids[-3:]):  # the fourth completes it
            if not self._model.is_byte(i):
                break
            raw = bytes([int(self._model.id_to_piece(i)[3:5], 16)]) + raw
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.decode(raw)
        return len(decoder.getstate()[0])

    def token_bytes(
        self, first: bool = False, special: bool = False
    ) -> list[bytes | None]:
        """What each id spells, before escapes are undone; None for special ids.

        Args:
          first: with nothing before it; decoding drops a piece's space there.
          special: what special ids read as, too, in place of None.
        """
        model, spelt = self._model, []
        for i in range(self.vocab_size):
            own = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            if special and (model.is_control(i) or model.is_unknown(i)):
                spelt.append(model.decode([i]).encode("utf-8"))
            elif not special and (own or i >= self.vocab_size - self.extra_ids):
                spelt.append(None)
            elif model.is_byte(i):
                spelt.append(bytes([int(model.id_to_piece(i)[3:5], 16)]))
            else:
                piece = model.id_to_piece(i)
                piece = piece.removeprefix("▁") if first else piece
                spelt.append(piece.replace("▁", " ").encode("utf-8"))
        return spelt

    def to_json(self) -> dict[str, Any]:
        """A JSON description for :func:`from_json`."""
        spec = {
            "kind": "sentencepiece",
            "model": MODEL_FILE,
            "extra_ids": self.extra_ids,
            "escape": self.escape,
        }
        if (self.pad_id, self.eos_id) != (PAD_ID, EOS_ID):
            spec |= {"pad_id": self.pad_id, "eos_id": self.eos_id}
        return spec

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes the model as ``vocabulary.model`` into ``directory``."""
        (pathlib.Path(directory) / MODEL_FILE).write_bytes(self.model_bytes)


def _read_bytes(path: str) -> bytes:
    if path.startswith("gs://"):  # TensorFlow, where it is, reads these without gcsfs
        from etils import epath

        return epath.Path(path).read_bytes()
    if remote.is_remote(path):
        return remote.copy(path).read_bytes()
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.model"))
        raise FileNotFoundError(
            f"No SentencePiece model at {path}; .model files in that folder: {beside}."
        )
    return file.read_bytes()


def _serialized_piece(piece: str) -> bytes:
    """A user-defined piece as one entry of a serialised ``ModelProto``.

    Written by hand because the generated module needs a protobuf package of matching
    version, which a machine that only trains may lack. Fields: 1 the piece, 2 its
    score, 3 its type (4: user-defined); the list itself is field 1 of the model.
    """
    text = piece.encode("utf-8")
    entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0)
    entry += b"\x18\x04"
    return b"\x0a" + bytes([len(entry)]) + entry
