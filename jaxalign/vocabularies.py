"""Text to token ids and back, without TensorFlow.

Ids are those of seqio's ``ByteVocabulary`` and ``SentencePieceVocabulary``: 0 is
padding, 1 ends a sequence, 2 is unknown, and ``extra_ids`` sentinels stand at the end.

A SentencePiece model loses what its normaliser folds (newlines, runs of spaces) and
what it has no piece for (braces and ``<`` in T5's). With ``escape=True`` such
characters are spelt with characters that the model does hold, and spelt back when
decoding, so that code, JSON and dialogues survive. Text that the model holds gives the
ids of seqio, unchanged.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import pathlib
import re
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxalign import remote

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
MODEL_FILE = "vocabulary.model"  # the name of a SentencePiece model beside a cache

# Candidates for the character that opens an escape, rarest in ordinary text first.
_ESCAPE_CHARACTERS = "§¶¤¦~^|_@#%"
# One-letter escapes. A newline takes a space with it, so that the next word keeps its
# word-initial piece.
_SHORT = {"\n": "n ", "\t": "t", "\r": "r", " ": "s", "{": "(", "}": ")", "<": "["}
_HEX = "0123456789abcdef"
_Utf8 = codecs.getincrementaldecoder("utf-8")


def _digest(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


class _Vocabulary:
    """What both vocabularies share: special ids, identity and cleaning of ids."""

    pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID
    extra_ids: int
    vocab_size: int
    fingerprint: str
    escapes: tuple[str, dict[str, str]] | None = None  # opener, and what letters mean

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes what ``from_json`` needs beside the JSON; nothing for bytes."""

    def _until_eos(self, ids: Iterable[int]) -> np.ndarray:
        sized = ids if hasattr(ids, "__len__") else list(ids)
        array = np.asarray(sized, np.int64)
        stops = np.flatnonzero(array == EOS_ID)
        array = array[: stops[0]] if len(stops) else array
        return array[array != PAD_ID]


class ByteVocabulary(_Vocabulary):
    """UTF-8 bytes as ids ``byte + 3`` (ByT5, arXiv 2105.13626).

    Args:
      extra_ids: sentinels at the end; 125 gives the 384 ids of the released ByT5.

    >>> ByteVocabulary().encode("hé")
    [107, 198, 172]
    """

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.vocab_size = 3 + 256 + extra_ids
        self.fingerprint = _digest(self.to_json())

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without EOS."""
        # Through numpy: prompts of thousands of bytes are common.
        raw = np.frombuffer(text.encode("utf-8"), np.uint8)
        return (raw.astype(np.int32) + 3).tolist()

    def decode(self, ids: Iterable[int], final: bool = True) -> str:
        """Text up to the first EOS; ids that are no bytes are left out.

        Half a character is left out too, so `final` changes nothing: no text of the
        first ids is ever taken back.
        """
        kept = self._until_eos(ids) - 3
        kept = kept[(kept >= 0) & (kept < 256)].astype(np.uint8).tobytes()
        return kept.decode("utf-8", errors="ignore")

    def token_bytes(
        self, first: bool = False, special: bool = False
    ) -> list[bytes | None]:
        """What each id spells; None for special ids, which with ``special`` are empty.

        ``first`` changes nothing.
        """
        letters = [bytes([b]) for b in range(256)]
        none = b"" if special else None
        return [none] * 3 + letters + [none] * self.extra_ids

    def to_json(self) -> dict[str, Any]:
        """A JSON description for :func:`from_json`."""
        return {"kind": "bytes", "extra_ids": self.extra_ids}


class SentencePieceVocabulary(_Vocabulary):
    """A SentencePiece model with sentinels at the end and reversible escaping.

    Args:
      path: the ``.model`` file; local, or remote such as ``gs://`` (which TensorFlow
        or gcsfs reads).
      extra_ids: sentinels ``<extra_id_0>``, ... at the end; the first has the
        highest id, as in T5.
      escape: spell characters that the model cannot hold with ones that it can.
        Sentinels at word starts stay sentinels.

    Raises:
      ValueError: when the model's padding, EOS and unknown ids are not 0, 1 and 2.
    """

    def __init__(self, path: str, extra_ids: int = 100, escape: bool = True):
        self.path = str(path)
        self.extra_ids = extra_ids
        self.escape = escape
        self.model_bytes = _read_bytes(self.path)
        self._load()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which may not see the model's file."""
        names = ("path", "extra_ids", "escape", "model_bytes")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        """The model from its bytes, and the escapes that it needs."""
        # Imported here: byte models need no SentencePiece.
        import sentencepiece

        extra_ids, escape = self.extra_ids, self.escape
        sentinels = b"".join(
            _serialized_piece(f"▁<extra_id_{i}>") for i in reversed(range(extra_ids))
        )
        # Serialised protos concatenate: this appends to the model's list of pieces.
        self._model = sentencepiece.SentencePieceProcessor(
            model_proto=self.model_bytes + sentinels
        )
        self._sentinels = sentinels
        special = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if special != (PAD_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"{self.path} has (pad, EOS, unknown) ids {special}, expected (0, 1, "
                "2) as in T5: train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1."
            )
        self.vocab_size = self._model.get_piece_size()
        self._held = functools.lru_cache(maxsize=None)(self._round_trips)
        self._opener = self._find_opener() if escape else ""
        self._codes = {
            c: code for c, code in _SHORT.items() if self._held(code.strip())
        }
        self._letters = {code.strip(): c for c, code in self._codes.items()}
        self._scanner = self._compile_scanner()
        if self._opener:
            self.escapes = (self._opener, self._letters)
        self.fingerprint = _digest(
            self.to_json() | {"sha256": hashlib.sha256(self.model_bytes).hexdigest()}
        )

    def __repr__(self) -> str:
        return (
            f"SentencePieceVocabulary({self.path!r}, extra_ids={self.extra_ids}, "
            f"escape={self.escape})"
        )

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
        if (
            self._opener
            and not escaped.isascii()
            and self._model.decode(ids) != escaped
        ):
            ids = self._model.encode(self.escape_text(text, strict=True))
        return ids

    def decode(self, ids: Iterable[int], final: bool = True) -> str:
        """Text up to the first EOS, escapes undone; unknown ids read `` ⁇ ``.

        Args:
          ids: of the text.
          final: whether they are all. If not, what further ids may change is held
            back: half a character of byte pieces, and an open escape. What is
            returned then is a prefix of the text of ``ids`` and any that follow.
        """
        kept = self._until_eos(ids)
        kept = np.where(kept < self.vocab_size, kept, UNK_ID).tolist()
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
        decoder = _Utf8("ignore")
        decoder.decode(raw)
        return len(decoder.getstate()[0])

    def escape_text(self, text: str, strict: bool = False) -> str:
        """Spells what the model cannot hold with what it can.

        Args:
          text: any text.
          strict: spell out all that is not plain ASCII, and sentinels too.
        """
        opener, out = self._opener, []
        if not opener:
            return text
        after_space = True  # a space here would be stripped: at the start, or doubled
        for match in self._scanner.finditer(text):
            part = match[0]
            if match.lastgroup == "plain":
                out.append(part)
            elif match.lastgroup == "spaces":
                # The last of a run stays, so that words keep their initial piece.
                keep = match.end() < len(text) and not (after_space and len(part) == 1)
                out.append((opener + "s") * (len(part) - keep) + " " * keep)
                after_space = keep
                continue
            elif match.lastgroup == "sentinel" and not strict:
                out.append(part)
            else:
                out.extend(self._spell(c, strict) for c in part)
                after_space = part == "\n" and "\n" in self._codes
                continue
            after_space = False
        if out and out[-1] == opener + "n ":
            out[-1] = opener + "n"
        return "".join(out)

    def _spell(self, c: str, strict: bool) -> str:
        if c == self._opener:
            return c + c
        if self._held(c) and (c.isascii() or not strict):
            return c
        code = self._codes.get(c)
        return self._opener + (f"x{ord(c):x};" if code is None else code)

    def unescape_text(self, text: str, final: bool = True) -> str:
        """Undoes :meth:`escape_text`; malformed escapes stay as they are.

        Args:
          text: escaped.
          final: whether it is all; if not, an escape that it ends in is left out.
        """
        if not self._opener:
            return text

        def restore(match: re.Match[str]) -> str:
            code, digits = match["code"], match["digits"]
            if match["open"] is not None:
                return match[0] if final else ""
            if digits:
                point = int(digits, 16)
                surrogate = 0xD800 <= point < 0xE000
                return match[0] if point > 0x10FFFF or surrogate else chr(point)
            if code == self._opener:
                return code
            return self._letters.get(code.strip(), match[0])

        opener = re.escape(self._opener)
        pattern = (
            f"{opener}(?:x(?P<digits>[{_HEX}]{{1,6}});"
            f"|(?P<open>(?:x[{_HEX}]{{0,6}})?\\Z)|(?P<code>n ?|.))"
        )
        return re.sub(pattern, restore, text, flags=re.DOTALL)

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
        return {
            "kind": "sentencepiece",
            "model": MODEL_FILE,
            "extra_ids": self.extra_ids,
            "escape": self.escape,
        }

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes the model as ``vocabulary.model`` into ``directory``."""
        (pathlib.Path(directory) / MODEL_FILE).write_bytes(self.model_bytes)

    def _round_trips(self, text: str) -> bool:
        return self._model.decode(self._model.encode(text)) == text

    def _compile_scanner(self) -> re.Pattern[str]:
        """Cuts text into sentinels at word starts, what passes as it is, and others."""
        held = [chr(i) for i in range(33, 127) if self._held(chr(i))]
        plain = "".join(re.escape(c) for c in held if c != self._opener)
        numbers = "|".join(str(i) for i in reversed(range(self.extra_ids)))
        return re.compile(
            (rf"(?P<sentinel>(?:^|(?<= ))<extra_id_(?:{numbers})>)|" if numbers else "")
            + (rf"(?P<plain>[{plain}]+)|" if plain else "")
            + r"(?P<spaces> +)|(?P<other>.)",
            flags=re.DOTALL,
        )

    def _find_opener(self) -> str:
        """The first character that can open escapes; empty when there is none."""
        if not all(self._held(c) for c in "nstx;" + _HEX):
            return ""
        return next((c for c in _ESCAPE_CHARACTERS if self._held(c)), "")


Vocabulary = ByteVocabulary | SentencePieceVocabulary


def from_json(spec: dict[str, Any], directory: str | pathlib.Path = ".") -> Vocabulary:
    """Rebuilds a vocabulary from its ``to_json`` and the folder it was saved in.

    >>> from_json({"kind": "bytes", "extra_ids": 125}).vocab_size
    384
    """
    if spec.get("kind") == "bytes":
        return ByteVocabulary(extra_ids=spec["extra_ids"])
    if spec.get("kind") == "sentencepiece":
        return SentencePieceVocabulary(
            str(remote.below(directory, spec["model"])),
            extra_ids=spec["extra_ids"],
            escape=spec["escape"],
        )
    raise ValueError(
        f"Unknown vocabulary kind {spec.get('kind')!r}; known: 'bytes', "
        "'sentencepiece'."
    )


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
