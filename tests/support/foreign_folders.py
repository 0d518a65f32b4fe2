"""Folders of every family that is known to load, with random weights and tokenizers.

They are written by ``transformers`` itself, so that nothing here says what they hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import torch
import transformers
from sentence_pieces import CORPUS

SIZES = dict(d_model=20, d_kv=6, d_ff=28, num_heads=3, num_layers=2)
SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)
T5_1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
MADLAD_IDS = dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=0)
CODE_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CODE_IDS |= dict(decoder_start_token_id=0)

# Family: architecture, what its config.json says, its tokenizer.
FAMILIES = {
    "t5_1_0": ("T5", dict(feed_forward_proj="relu"), "pieces"),
    # LM-adapted, Flan-T5, T0, Tk-Instruct and monoT5 differ by their numbers only.
    "t5_1_1": ("T5", T5_1_1, "pieces"),
    "mt5": ("MT5", dict(tie_word_embeddings=False), "multilingual"),  # Aya-101 too
    "umt5": ("UMT5", {}, "tokenizer.json"),
    # A shallower decoder; transformers 5.23 cannot generate with a deeper one.
    "byt5": ("T5", T5_1_1 | dict(num_decoder_layers=1), "bytes"),
    "ul2": ("T5", T5_1_1 | dict(feed_forward_proj="gated-silu"), "pieces"),
    "madlad": ("T5", T5_1_1 | MADLAD_IDS, "madlad"),
    "codet5": ("T5", dict(feed_forward_proj="relu") | CODE_IDS, "bpe"),
    "codet5_old": ("T5", dict(feed_forward_proj="relu") | CODE_IDS, "bpe files"),
    "metricx": ("MT5", dict(architectures=["MT5ForRegression"]), "multilingual"),
    "flan_5": ("T5", T5_1_1, "tokenizer.json"),  # as transformers 5 saves it again
}


def write(family: str, folder: Path, **more) -> torch.nn.Module:
    """Writes a folder; returns the model, on whose parameters it is based."""
    architecture, fields, tokenizer = FAMILIES[family]
    size = write_tokenizer(tokenizer, folder)
    pieces = size - {"bytes": 125, "bpe": 5, "bpe files": 5}.get(
        tokenizer, 100 * (tokenizer in ("pieces", "tokenizer.json"))
    )
    eos = fields.get("eos_token_id", 1)
    rows = size + 28 if tokenizer != "bytes" else size  # padded, as a T5's
    torch.manual_seed(len(family))
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=rows,
        dropout_rate=0.0,
        **{**dict(decoder_start_token_id=0), **SIZES, **fields},
    )
    name = f"{architecture}ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    if fields.get("tie_word_embeddings") is False or architecture != "T5":
        # transformers 5 ties at construction and unties by what a checkpoint holds.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(rows, config.d_model))
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 100
            parameter.normal_(0, 1.5 * fan_in**-0.5)
            if parameter.ndim == 1:
                parameter += 1
        for table in {model.shared.weight, model.lm_head.weight}:
            # Greedy text is of pieces: what has no text of its own is never likeliest.
            for token in (*range(eos), *range(eos + 1, 4), *range(pieces, rows)):
                table[token] = 0
    model.save_pretrained(folder, **more)
    return model


def write_tokenizer(kind: str, folder: Path) -> int:
    """Writes a tokenizer's files as the family's folders hold them; returns its size.

    Of a kind with a text that no released tokenizer has, it is small all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if kind == "bytes":
        settings |= dict(tokenizer_class="ByT5Tokenizer", extra_ids=125)
        size = 384
    elif kind.startswith("bpe"):
        size = _byte_level(folder, kind)
        settings |= dict(tokenizer_class="RobertaTokenizer", bos_token="<s>")
    else:
        special = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        if kind == "madlad":
            special = dict(pad_id=-1, eos_id=2, unk_id=0, bos_id=1)
            settings["pad_token"] = "<s>"
        size = _sentence_pieces(folder / "spiece.model", **special)
        extra = {"pieces": 100, "tokenizer.json": 100}.get(kind, 0)
        size += extra
        settings |= dict(tokenizer_class="T5Tokenizer", extra_ids=extra)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    if kind == "tokenizer.json":
        again = transformers.AutoTokenizer.from_pretrained(folder)
        for file in folder.iterdir():
            file.unlink()
        again.save_pretrained(folder)
    return size


def _sentence_pieces(path: Path, **special) -> int:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **special,
    )
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(str(path)).get_piece_size()


def _byte_level(folder: Path, kind: str) -> int:
    """A RoBERTa tokenizer: its older files, or the one of today."""
    import tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    model = tokenizers.ByteLevelBPETokenizer()
    texts = CORPUS * 5
    model.train_from_iterator(
        texts, 330, 2, special_tokens=special, show_progress=False
    )
    model.save_model(str(folder))
    size = model.get_vocab_size()
    added = {f"<extra_id_{i}>": size + 4 - i for i in range(5)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if kind == "bpe":
        pieces = sorted(added, key=added.get)
        model.add_special_tokens(pieces)
        ends = [("</s>", 2), ("<s>", 1)]
        model._tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
            *ends, add_prefix_space=False
        )
        model.save(str(folder / "tokenizer.json"))
    return size + 5
