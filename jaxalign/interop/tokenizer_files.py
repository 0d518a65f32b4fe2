"""The tokenizer of a Hugging Face folder, in both directions.

Which ids pad, end and start a text is said by ``config.json`` (and repeated by
``generation_config.json``); the tokenizer's own files say what the ids spell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign import remote
from jaxalign.interop import unigram
from jaxalign.interop.tensor_files import DamagedFolderError, read_json
from jaxalign.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from jaxalign.vocabularies.tokenizer_json import TOKENIZER_FILE, tokenizers

SPIECE = "spiece.model"
_SETTINGS, _ADDED = "tokenizer_config.json", "added_tokens.json"
_BPE = ("vocab.json", "merges.txt")
FILES = (SPIECE, _SETTINGS, _ADDED, TOKENIZER_FILE, "special_tokens_map.json", *_BPE)
_CONFIGS = ("config.json", "generation_config.json")
_SENTINELS = 100  # of a T5
# More unused rows than this, and than a tenth of the tokenizer's ids: not padding.
_UNUSED = 512


def ids_of(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, int]:
    """The ids of padding, EOS and start; a T5's where the files do not say.

    Raises:
      ValueError: where they are no ids of the embedding, or no decoder starts so.
    """
    found = {}
    for name, key, usual in (
        ("pad_id", "pad_token_id", 0),
        ("eos_id", "eos_token_id", 1),
        ("start_id", "decoder_start_token_id", None),
    ):
        value = config.get(key, generation.get(key))
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            value = found["pad_id"] if usual is None else usual
        if not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
            raise ValueError(
                f"config.json must have {key} in [0, {config['vocab_size']}), its "
                f"vocab_size, got {value!r}."
            )
        found[name] = value
    if found["start_id"] != 0:
        raise ValueError(
            "config.json must have decoder_start_token_id=0, got "
            f"{found['start_id']}: every T5 starts so, and responses are shifted "
            "right with it."
        )
    return found


def read(
    folder: Path, config: Mapping[str, Any], ids: Mapping[str, int]
) -> Vocabulary | None:
    """The vocabulary of a folder; None where it has no tokenizer.

    Text is split as the tokenizer does it: characters that it lacks are unknown, and
    not spelt with others (``escape=False``).

    Args:
      folder: local.
      config: of its ``config.json``.
      ids: from `ids_of`.

    Raises:
      ImportError: where it takes the package ``tokenizers``, which is not installed.
      ValueError: for a tokenizer that is not this network's.
    """
    settings = _json(folder / _SETTINGS)
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    sentinels = _sentinels(folder, settings)
    pieces = (folder / SPIECE).is_file()
    if config.get("model_type") == "umt5" and (folder / TOKENIZER_FILE).is_file():
        pieces = False  # AutoTokenizer wants a tokenizer.json of a umT5, too
    if name.startswith("ByT5"):
        vocabulary = ByteVocabulary(extra_ids=settings.get("extra_ids", 125))
    elif pieces and not _own_tokens(folder, settings):
        extra = settings.get("extra_ids", sentinels or None)
        vocabulary = _sentence_pieces(folder / SPIECE, extra, config, ids)
    elif (folder / TOKENIZER_FILE).is_file():
        text = (folder / TOKENIZER_FILE).read_text("utf-8")
        vocabulary = TokenizerVocabulary(text, **ids)
    elif all((folder / file).is_file() for file in _BPE):
        vocabulary = TokenizerVocabulary(_byte_level_bpe(folder, settings), **ids)
    elif pieces:
        raise ValueError(
            f"{folder} adds tokens of its own to {SPIECE} ({_ADDED}, {_SETTINGS}) and "
            f"has no {TOKENIZER_FILE}, which says where they stand: write it with "
            "transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(...))."
        )
    else:
        return None
    _check(folder, vocabulary, config, ids, settings)
    return vocabulary


def at(path: str, rows: int, extra: int | None = None) -> Vocabulary | None:
    """The vocabulary of a tokenizer's own file, or of a Hugging Face folder.

    Args:
      path: a SentencePiece file, a ``tokenizer.json`` or a folder, here or in a bucket;
        or the word ``bytes``.
      rows: of the embedding that it is for.
      extra: sentinels behind a SentencePiece model; where it is not known, a T5's 100
        if there is room for them.

    Returns:
      None for a folder that is none of Hugging Face's.

    Raises:
      FileNotFoundError: where there is no such path.
      ValueError: for a file that is neither.
    """
    if path == "bytes":
        return ByteVocabulary(extra_ids=125)
    usual = {"pad_id": 0, "eos_id": 1, "start_id": 0}
    if path.endswith(".json"):
        text = remote.copy(path).read_text("utf-8")
        found = TokenizerVocabulary(text, **usual)
        own = {"pad_id": found.token_id("<pad>"), "eos_id": found.token_id("</s>")}
        told = {key: value for key, value in own.items() if value is not None}
        return TokenizerVocabulary(text, **{**usual, **told})
    if path.endswith(".model") or Path(path).is_file():
        found = SentencePieceVocabulary(path, extra or 0, escape=False)
        if extra is None and rows - found.vocab_size >= _SENTINELS:
            found = SentencePieceVocabulary(path, _SENTINELS, escape=False)
        return found
    folder = remote.copy_folder(path, lambda name: name in (*FILES, *_CONFIGS))
    if not any((folder / name).is_file() for name in FILES):
        return None
    config, generation = (_json(folder / name) for name in _CONFIGS)
    config = {"vocab_size": rows, **config}
    return read(folder, config, ids_of(config, generation))


def check_size(where: Any, vocabulary: Vocabulary, rows: int) -> None:
    """Refuses a tokenizer of more ids than an embedding has rows, or of far fewer."""
    size = vocabulary.vocab_size
    if size > rows or rows - size > max(_UNUSED, size // 10):
        raise ValueError(
            f"{where}: the tokenizer has {size:,} ids, the embedding {rows:,} rows; "
            "is it another network's tokenizer?"
        )


def _check(
    folder: Path,
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    settings: Mapping[str, Any],
) -> None:
    check_size(folder, vocabulary, config["vocab_size"])
    ask = "is it another network's tokenizer?"
    for key in ("pad", "eos"):
        found = getattr(vocabulary, f"{key}_id")
        if isinstance(vocabulary, TokenizerVocabulary):
            own = vocabulary.token_id(_text(settings, key))
            found = found if own is None else own
        if found != ids[f"{key}_id"]:
            raise ValueError(
                f"{folder}: the tokenizer's {key} token is {found}, config.json says "
                f"{key}_token_id={ids[f'{key}_id']}; {ask}"
            )


def _sentence_pieces(
    path: Path, extra: int | None, config: Mapping[str, Any], ids: Mapping[str, int]
) -> SentencePieceVocabulary:
    own = {"pad_id": ids["pad_id"], "eos_id": ids["eos_id"]}
    found = SentencePieceVocabulary(str(path), extra or 0, escape=False, **own)
    room = config["vocab_size"] - found.vocab_size
    if extra is None and config.get("model_type", "t5") == "t5" and room >= _SENTINELS:
        return SentencePieceVocabulary(str(path), _SENTINELS, escape=False, **own)
    return found


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """What stands beside the model's own pieces, by its text."""
    found = {token: int(i) for token, i in _json(folder / _ADDED).items()}
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        found[token["content"] if isinstance(token, Mapping) else token] = int(i)
    return found


def _sentinels(folder: Path, settings: Mapping[str, Any]) -> int:
    return sum(t.startswith("<extra_id_") for t in _added(folder, settings))


def _own_tokens(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether tokens were added that are neither sentinels nor the model's own."""
    known = {settings.get(f"{k}_token") for k in ("pad", "eos", "unk", "bos")}
    known = {t.get("content") if isinstance(t, Mapping) else t for t in known}
    known |= {"<pad>", "</s>", "<unk>", "<s>"}
    added = _added(folder, settings)
    return any(t not in known and not t.startswith("<extra_id_") for t in added)


def _byte_level_bpe(folder: Path, settings: Mapping[str, Any]) -> str:
    """The ``tokenizer.json`` of a RoBERTa tokenizer that has only its older files."""
    package = tokenizers()
    vocab, merges = (str(folder / file) for file in _BPE)
    tokenizer = package.ByteLevelBPETokenizer.from_file(vocab, merges)
    for token, _ in sorted(_added(folder, settings).items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([token])
    first, last = (str(_text(settings, key)) for key in ("bos", "eos"))
    ids = {text: tokenizer.token_to_id(text) for text in (first, last)}
    if None in ids.values():
        raise DamagedFolderError(f"{folder / _BPE[0]} lacks {first!r} or {last!r}.")
    for key in ("bos", "eos", "pad", "unk"):
        tokenizer.add_special_tokens([str(_text(settings, key))])
    tokenizer._tokenizer.post_processor = package.processors.RobertaProcessing(
        (last, ids[last]), (first, ids[first]), add_prefix_space=False
    )
    return tokenizer.to_str()


def _text(settings: Mapping[str, Any], key: str) -> str:
    usual = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    found = settings.get(f"{key}_token") or usual[key]
    return found["content"] if isinstance(found, Mapping) else found


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write(folder: Path, vocabulary: Vocabulary, model_type: str = "t5") -> None:
    """Writes the files by which ``AutoTokenizer`` finds a vocabulary.

    Args:
      folder: exists.
      vocabulary: any.
      model_type: as ``config.json`` says it. Pieces of a "umt5" are written as
        ``tokenizer.json``, too, which takes the package ``tokenizers``.
    """
    special = {}
    if isinstance(vocabulary, ByteVocabulary):
        settings = {"tokenizer_class": "ByT5Tokenizer"}
        settings["extra_ids"] = vocabulary.extra_ids
        special = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    elif isinstance(vocabulary, SentencePieceVocabulary):
        (folder / SPIECE).write_bytes(vocabulary.model_bytes)
        if model_type == "umt5":
            text = unigram.tokenizer_json(vocabulary)
            (folder / TOKENIZER_FILE).write_text(text, "utf-8")
        settings = {"tokenizer_class": "T5Tokenizer"}
        settings["extra_ids"] = vocabulary.extra_ids
        for key in ("pad", "eos", "unk"):
            special[key] = vocabulary.piece(getattr(vocabulary, f"{key}_id"))
    else:
        (folder / TOKENIZER_FILE).write_text(vocabulary.text, "utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key in ("pad", "eos", "unk"):
            if (number := getattr(vocabulary, f"{key}_id")) >= 0:
                special[key] = vocabulary.piece(number)
    settings |= {f"{key}_token": token for key, token in special.items()}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
