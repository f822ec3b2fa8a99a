"""Vocabularies of GGUF files: llama.cpp makes the same tokens of a text as transformers, or the file is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seap_ray.errors import ConfigError
from seap_ray.models.gguf.vocabulary import LLAMA_3_WORDS, QWEN_2_WORDS, TEKKEN_WORDS, read_vocabulary
from seap_ray.models.gguf.writer import GgufExport
from seap_ray.storage.paths import storage_path
from tests.support.builders import make_tokenizer
from tests.support.llama_cpp import LlamaCpp

TEXTS = (
    "The cat's 1234 hats, they'LL say: \"we've 3.14159!\"",
    "  two blanks,\ttabs\t\tand\n\nlines \n end ",
    "Größe naïve café 北京 привет 🙂 ½",
    "def f(x):\n    return x[0] + 12 ** 3  # <end> of it",
    "<bos>again<eos> and <tool> after",
    "",
)
"""Words, contractions, numbers, blanks, other alphabets, tokens in a text, nothing."""
CORPUS = [*TEXTS, "the then there hat cat that chat say saying day says 12 123 1234 return returns"] * 3
ADDED = ("<bos>", "<eos>", "<unk>")
SPACE = "▁"


def saved(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    """Write a tiny model with a tokenizer of its own."""
    options = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **settings}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast) + 3, **sizes))
    model.save_pretrained(folder)
    return folder


def merged_bytes(steps: list[pre_tokenizers.PreTokenizer], *, ignore_merges: bool = False) -> Tokenizer:
    """Return a tokenizer of byte merges, trained on the texts, that cuts words by some steps."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(ADDED), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def words_by(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps of a tokenizer that cuts words by a pattern of its own."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def byte_level() -> pre_tokenizers.PreTokenizer:
    """Return GPT-2's way to cut words."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def pieces() -> list[str]:
    """Return pieces as SentencePiece's, the most frequent ones first."""
    found: dict[str, int] = {}
    for text in CORPUS:
        text = text.replace("<", " ")
        # "1" is no piece, so that it is spelled by a byte.
        for word in text.replace("1", " ").replace(" ", f" {SPACE}").split(" "):
            for start in range(len(word)):
                for end in range(start + 2, min(start + 6, len(word)) + 1):
                    found[word[start:end]] = found.get(word[start:end], 0) + 1
    return sorted(found, key=lambda piece: (-found[piece], piece))[:150]


def merged_characters(
    normalizer: normalizers.Normalizer | None, cutter: pre_tokenizers.PreTokenizer | None
) -> Tokenizer:
    """Return a tokenizer as transformers makes it of a SentencePiece model with merges."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({*"".join(pieces())} | {SPACE})
    vocab = {token: i for i, token in enumerate([*ADDED, *bytes_, *pieces(), *characters])}
    merges = []
    for piece in pieces():
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((piece[:cut], piece[cut:]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(list(ADDED))
    tokenizer.add_tokens(["<tool>"])
    if normalizer:
        tokenizer.normalizer = normalizer
    if cutter:
        tokenizer.pre_tokenizer = cutter
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def likeliest() -> Tokenizer:
    """Return a unigram tokenizer."""
    characters = sorted({*"".join(TEXTS)} - {" "} | {SPACE})
    scored = [*((token, 0.0) for token in ADDED), *((piece, -1.0 - i / 100) for i, piece in enumerate(pieces()))]
    scored += [(character, -9.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.add_special_tokens(list(ADDED))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return tokenizer


REPLACE = normalizers.Replace(" ", SPACE)
TOKENIZERS: dict[str, tuple[str, str, Callable[[], Tokenizer]]] = {
    "GPT-2": ("gpt2", "gpt-2", lambda: merged_bytes([byte_level()])),
    "SmolLM": ("gpt2", "smollm", lambda: merged_bytes([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "Llama 3": ("gpt2", "llama-bpe", lambda: merged_bytes(words_by(LLAMA_3_WORDS), ignore_merges=True)),
    "Phi-4": ("gpt2", "dbrx", lambda: merged_bytes(words_by(LLAMA_3_WORDS))),
    "Qwen 2": ("gpt2", "qwen2", lambda: merged_bytes(words_by(QWEN_2_WORDS))),
    "Mistral Nemo": ("gpt2", "tekken", lambda: merged_bytes(words_by(TEKKEN_WORDS))),
    "Llama 2": (
        "llama",
        "default",
        lambda: merged_characters(normalizers.Sequence([normalizers.Prepend(SPACE), REPLACE]), None),
    ),
    "Gemma": (
        "llama",
        "default",
        lambda: merged_characters(REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    ),
    "unigram": ("t5", "default", likeliest),
}
"""Tokenizers, and llama.cpp's names of their kind and of their way to cut words."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens(tmp_path, name):
    kind, words, make = TOKENIZERS[name]
    folder = saved(tmp_path / "model", make())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    export = GgufExport.of(folder, "F32", name)
    assert (export.vocabulary.model, export.vocabulary.words) == (kind, words)
    export.write(storage_path(tmp_path / "model.gguf"))

    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        # Before a first blank llama.cpp puts another one, of which there is a warning.
        if export.vocabulary.warnings and (text.startswith(" ") or "> " in text):
            continue
        assert llama_cpp.tokenize(text) == tokenizer(text)["input_ids"], text
