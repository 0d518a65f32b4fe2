"""Token judges on Hugging Face folders: the numbers that transformers gives."""

from __future__ import annotations

import foreign_folders
import numpy as np
import pytest
import torch
import transformers

from jaxalign import judges

PROMPTS = ["The quick brown fox", "say it", "a b c"]
RESPONSES = ["jumps over the lazy dog", "well", "sums 48 and 16"]


@pytest.fixture(scope="module", params=["metricx", "t5_1_1"])
def folder(request, tmp_path_factory):
    """A folder, what transformers wrote of it, and its tokenizer."""
    path = tmp_path_factory.mktemp("judge") / request.param
    model = foreign_folders.write(request.param, path)
    return path, model, transformers.AutoTokenizer.from_pretrained(path)


def first_logits(model, rows):
    """``[n, V]``: one decoder step, which begins with id 0, on rows of ids."""
    found = []
    for ids in rows:
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]])
            )
        found.append(out.logits[0, 0].numpy())
    return np.stack(found)


def test_metricx_reads_one_logit_and_clips_it(folder):
    path, model, tokenizer = folder
    rows = [
        tokenizer(f"source: {p} candidate: {r}").input_ids[:-1]  # without EOS
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    logits = first_logits(model, rows)[:, 42]
    found = judges.resolve(f"token:{path}#42")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    low, high = np.sort(logits)[:2]
    middle = (low + high) / 2
    clipped = judges.resolve(f"-1*token:{path}?clip={middle},{middle + 25}#42")
    wanted = -np.clip(logits, middle, middle + 25)
    np.testing.assert_allclose(clipped(PROMPTS, RESPONSES), wanted, atol=1e-4)
    assert (wanted > -logits - 1e-6).any() and (wanted != -logits).any()


def test_long_texts_are_cut_as_metricx_cuts_them(folder):
    path, model, tokenizer = folder
    rows = [
        # Cut with EOS, which is then taken away.
        tokenizer(f"source: {p} candidate: {r}", max_length=12, truncation=True)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    rows = [row.input_ids[:-1] for row in rows]
    assert max(map(len, rows)) == 11
    found = judges.resolve(f"token:{path}?max_length=12#42")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, first_logits(model, rows)[:, 42], atol=1e-4)


def test_a_reranker_compares_two_tokens(folder):
    path, model, tokenizer = folder
    rows = [
        tokenizer(f"Query: {p} Document: {r} Relevant:").input_ids
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    two = torch.from_numpy(first_logits(model, rows)[:, [50, 60]])
    found = judges.resolve(f"token:{path}#50,60")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, two.softmax(-1)[:, 0].numpy(), atol=1e-5)
    assert 0.0 < found.min() < found.max() < 1.0


def test_a_template_names_a_reference(folder, tmp_path):
    path, model, tokenizer = folder
    text = "source: {prompt} candidate: {response} reference: {reference}"
    (tmp_path / "metricx.md").write_text(f"---\nclip: -100 100\neos: 1\n---\n{text}")
    judge = judges.resolve(f"token:{path}#42#{tmp_path / 'metricx.md'}")
    about = [{"reference": "fox " * n} for n in (1, 2, 3)]
    texts = [
        text.format(prompt=p, response=r, **a)
        for p, r, a in zip(PROMPTS, RESPONSES, about, strict=True)
    ]
    logits = first_logits(model, [tokenizer(t).input_ids for t in texts])[:, 42]
    found = judge(PROMPTS, RESPONSES, about)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    other = judges.resolve(f"token:{path}?eos=0#42#{tmp_path / 'metricx.md'}")
    assert other.fingerprint != judge.fingerprint
    assert np.abs(other(PROMPTS, RESPONSES, about) - found).max() > 1e-3
