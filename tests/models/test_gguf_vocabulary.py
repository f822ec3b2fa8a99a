"""Vocabularies of GGUF files: llama.cpp makes the same tokens of a text as transformers, or the file is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
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
NUMBERS = "1 12 123 1234 12345 123456 1234567 3.14159 2,718,281 x1y22z333"
CORPUS = [*TEXTS, NUMBERS, "the then there hat cat that chat say saying day says 12 123 1234 return returns"] * 3
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
    """Return a tokenizer of byte merges, trained on the texts, that cuts words by some steps.

    Its merges go beyond words, so that a text that is cut elsewhere has other tokens.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(ADDED), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
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
    for text in (*TEXTS, NUMBERS):
        # Before a first blank llama.cpp puts another one, of which there is a warning.
        if export.vocabulary.warnings and (text.startswith(" ") or "> " in text):
            continue
        assert llama_cpp.tokenize(text) == tokenizer(text)["input_ids"], text


def test_a_token_a_character_is_the_likeliest_sequence(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, 50)
    assert vocabulary.model == "t5" and vocabulary.tokens[:4] == ("<pad>", "<bos>", "<unk>", "a")
    assert vocabulary.tokens[3 + 26] == SPACE and vocabulary.tokens[47:] == ("[PAD47]", "[PAD48]", "[PAD49]")
    kinds = gguf.TokenType
    assert vocabulary.types[:4] == (kinds.CONTROL, kinds.CONTROL, kinds.UNKNOWN, kinds.NORMAL)
    assert vocabulary.special == {"bos": 1, "unknown": 2, "padding": 0}
    assert vocabulary.flags["add_bos_token"] is False and vocabulary.chat_template.startswith("{{ messages[-1]")


def test_tokens_that_end_an_answer_are_told(tmp_path):
    folder = saved(tmp_path, merged_bytes([byte_level()]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5, 6]}')
    special = read_vocabulary(folder, 800).special
    assert special["eos"] == 1 and special["eot"] == 5


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def foreign_words() -> Tokenizer:
    return merged_bytes(words_by(r"\w+|\s+|[^\w\s]+"))


def lowercased() -> Tokenizer:
    tokenizer = merged_bytes([byte_level()])
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_a_blank_first() -> Tokenizer:
    return merged_bytes([pre_tokenizers.ByteLevel(add_prefix_space=True)])


def without_some_bytes() -> Tokenizer:
    tokenizer = merged_characters(REPLACE, None)
    parts = json.loads(tokenizer.to_str())
    del parts["model"]["vocab"]["<0x41>"]
    return Tokenizer.from_str(json.dumps(parts))


def without_a_pair() -> Tokenizer:
    parts = json.loads(merged_characters(REPLACE, None).to_str())
    parts["model"]["merges"].pop(3)
    return Tokenizer.from_str(json.dumps(parts))


def out_of_order() -> Tokenizer:
    parts = json.loads(merged_characters(REPLACE, None).to_str())
    merges = parts["model"]["merges"]
    merges.append(merges.pop(0))
    twice = next(i for i, pair in enumerate(merges) if "".join(pair) == "".join(merges[i + 1]))
    merges.append(merges.pop(twice))
    return Tokenizer.from_str(json.dumps(parts))


def other_tokens_around() -> Tokenizer:
    tokenizer = merged_bytes([byte_level()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    return tokenizer


REFUSED = {
    "vocabulary of whole words": word_level,
    r"way to cut words (\w+|\s+|[^\w\s]+; byte_level)": foreign_words,
    "normalizer Lowercase": lowercased,
    "way to cut words (ByteLevel)": with_a_blank_first,
    "vocabulary without all single bytes": without_some_bytes,
    "which it never merges": without_a_pair,
    "order of merges": out_of_order,
    "tokens around a text": other_tokens_around,
    "model WordPiece": lambda: Tokenizer(models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>")),
}
"""Tokenizers that llama.cpp does not have, by what the line says."""


@pytest.mark.parametrize("part", REFUSED)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_in_one_line(tmp_path, part):
    PreTrainedTokenizerFast(tokenizer_object=REFUSED[part](), unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refused:
        read_vocabulary(tmp_path, 1000)
    line = str(refused.value)
    assert line.startswith("export.format: gguf is not for this tokenizer, since llama.cpp does not have its ")
    assert part in line and line.endswith("; use export.format=seap") and "\n" not in line


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"there are 40 rows and the token '=' with the id 46; use export.format=seap"
    ):
        read_vocabulary(tmp_path, 40)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^export.format: gguf needs the tokenizer of .*\)$"):
        read_vocabulary(tmp_path, 40)
