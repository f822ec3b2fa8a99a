"""Vocabulary of a GGUF file: a tokenizer in, the tokens and rules by which llama.cpp does the same out.

llama.cpp has its own tokenizers and knows one by a name (``tokenizer.ggml.model``), and what cuts a text into words by
another (``tokenizer.ggml.pre``). A tokenizer is matched by its parts, which ``tokenizer.json`` has; one whose parts are
not known is refused, since a near match would go unnoticed and answer worse.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seap_ray.errors import ConfigError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3_WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    ("byte_level with words",): "gpt-2",
    ("digits", "byte_level with words"): "smollm",
    (LLAMA_3_WORDS, "byte_level"): "dbrx",
    (QWEN_2_WORDS, "byte_level"): "qwen2",
    (TEKKEN_WORDS, "byte_level"): "tekken",
}
"""llama.cpp's names (``tokenizer.ggml.pre``) of what cuts a text into words, by the steps of ``tokenizer.json``."""
WHOLE_WORDS_FIRST = {"dbrx": "llama-bpe"}
"""The same for a tokenizer that takes a word which is a token as it is, whatever its merges (``ignore_merges``)."""
SPACE = "▁"
"""What SentencePiece writes for a blank."""
N_BYTES = 256
"""Tokens of single bytes that a SentencePiece vocabulary must have for texts of other characters."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer."""

    model: str
    """Its kind: ``gpt2`` (merges of bytes), ``llama`` (merges of characters) or ``t5`` (the likeliest sequence)."""
    words: str
    """What cuts a text into words first; ``default`` where nothing does."""
    tokens: tuple[str, ...]
    """Every row of the embedding, those without a token as unused ones."""
    types: tuple[int, ...]
    """Kind of each token, ``gguf.TokenType``."""
    scores: tuple[float, ...] = ()
    """Rank of each token, higher ones first; none for merges of bytes."""
    merges: tuple[str, ...] = ()
    """Pairs of tokens in the order in which they are merged."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """Switches, such as ``add_bos_token``, by the ends of their keys."""
    special: Mapping[str, int] = field(default_factory=dict)
    """Ids of tokens with a meaning, such as ``bos``."""
    chat_template: str | None = None
    """Jinja template of a conversation."""
    warnings: tuple[str, ...] = ()
    """Lines on what llama.cpp does otherwise."""

    def add_to(self, writer: Any) -> None:
        """Tell a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.words)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)

        for key, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        for name, token_id in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, n_tokens: int) -> Vocabulary:
    """Read the tokenizer in a model's folder.

    Args:
        folder: The folder.
        n_tokens: Rows of the model's embedding.

    Returns:
        The vocabulary, with as many tokens as there are rows.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or there is none.
    """
    return _Reader.of(folder, n_tokens).vocabulary()


@dataclass(frozen=True)
class _Reader:
    """A tokenizer as transformers loads it, and the content of its ``tokenizer.json``."""

    folder: Path
    tokenizer: Any
    parts: Mapping[str, Any]
    n_tokens: int

    @classmethod
    def of(cls, folder: Path, n_tokens: int) -> "_Reader":
        """Load the tokenizer of a folder. Raises ConfigError where there is none that has a ``tokenizer.json``."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"export.format: gguf needs the tokenizer of {folder} ({reason})") from None
        if not getattr(tokenizer, "backend_tokenizer", None):
            raise ConfigError(
                f"export.format: gguf needs a tokenizer.json, which {type(tokenizer).__name__} does not have; use "
                "export.format=seap"
            )
        return cls(folder, tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()), n_tokens)

    def refused(self, part: str) -> ConfigError:
        """Return the error of a part that llama.cpp does not have."""
        return ConfigError(
            f"export.format: gguf is not for this tokenizer, since llama.cpp does not have its {part}; use "
            "export.format=seap"
        )

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary by the kind of the tokenizer's model."""
        model = self.parts["model"]
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in self._used_added_tokens()):
            warnings = ["tokens of this tokenizer take the blanks beside them, in llama.cpp they do not"]
        else:
            warnings = []

        if model["type"] == "BPE" and model.get("byte_fallback"):
            return self._merged_characters(warnings)
        if model["type"] == "BPE":
            return self._merged_bytes(warnings)
        if model["type"] == "Unigram":
            return self._likeliest(warnings)
        if model["type"] == "WordLevel":
            return self._single_characters(warnings)
        raise self.refused(f"model {model['type']}")

    # --- the kinds ---------------------------------------------------------------------------------------------------

    def _merged_bytes(self, warnings: list[str]) -> Vocabulary:
        """Return the vocabulary of a GPT-2, Llama 3 or Qwen: merges of bytes inside words."""
        model = self.parts["model"]
        # llama.cpp leaves out Unicode's composition of characters, which Qwen's tokenizers do first.
        normalizer = self.parts["normalizer"]
        if normalizer and normalizer["type"] != "NFC":
            raise self.refused(f"normalizer {normalizer['type']}")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
            raise self.refused("marks of parts of a word")

        words = self._words()
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if not merges:
            raise self.refused("vocabulary without merges")
        return self._completed("gpt2", words, merges=tuple(merges), warnings=warnings)

    def _words(self) -> str:
        """Return llama.cpp's name of what cuts a text into words."""
        steps = tuple(_step(part) for part in _sequence(self.parts["pre_tokenizer"], "pretokenizers"))
        name = WORDS.get(steps)
        if name is None:
            raise self.refused(f"way to cut words ({'; '.join(steps)[:80] or 'none'})")
        if self.parts["model"].get("ignore_merges"):
            return WHOLE_WORDS_FIRST.get(name, name)
        return name

    def _merged_characters(self, warnings: list[str]) -> Vocabulary:
        """Return the vocabulary of a Llama 2, Mistral or Gemma: SentencePiece's merges of characters."""
        adds_space, differences = self._adds_space()
        vocab = self.parts["model"]["vocab"]
        if sum(f"<0x{byte:02X}>" in vocab for byte in range(N_BYTES)) < N_BYTES:
            raise self.refused("vocabulary without all single bytes")
        flags = {"add_space_prefix": adds_space}
        return self._completed(
            "llama", "default", scores=self._merge_ranks(), flags=flags, warnings=[*warnings, *differences]
        )

    def _merge_ranks(self) -> dict[str, float]:
        """Return by token its rank among merges: SentencePiece merges whichever pair makes the token that comes first.

        Raises ConfigError where that is another rule than that of the tokenizer's list of pairs.
        """
        model = self.parts["model"]
        vocab = model["vocab"]
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]

        ranks: dict[str, float] = {}
        previous = ""
        for left, right in pairs:
            token = left + right
            # All pairs that make a token must follow one another.
            if token in ranks and token != previous:
                raise self.refused("order of merges")
            ranks.setdefault(token, -float(len(ranks)))
            previous = token

        self._check_all_pairs({*pairs}, vocab)
        return ranks

    def _check_all_pairs(self, pairs: set[tuple[str, ...]], vocab: Mapping[str, int]) -> None:
        """Raise ConfigError where two tokens make a third one, and the tokenizer does not merge them.

        llama.cpp merges whatever makes a token, characters that are no tokens themselves as well.
        """
        added = {token["content"] for token in self.parts["added_tokens"]}
        bytes_ = {f"<0x{byte:02X}>" for byte in range(N_BYTES)}
        for token in vocab.keys() - added - bytes_:
            if not vocab.keys() >= {*token}:
                raise self.refused(f"token {token!r}, whose characters are not all tokens")
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocab and right in vocab and (left, right) not in pairs and not {left, right} & added:
                    raise self.refused(f"token {token!r}, which it never merges")

    def _likeliest(self, warnings: list[str]) -> Vocabulary:
        """Return the vocabulary of SentencePiece's unigram model: the sequence of tokens with the highest score."""
        adds_space, differences = self._adds_space()
        model = self.parts["model"]
        if model.get("byte_fallback"):
            raise self.refused("single bytes in a unigram model")
        scores = {token: float(score) for token, score in model["vocab"]}
        flags = {"add_space_prefix": adds_space, "remove_extra_whitespaces": False}
        return self._completed("t5", "default", scores=scores, flags=flags, warnings=[*warnings, *differences])

    def _single_characters(self, warnings: list[str]) -> Vocabulary:
        """Return the vocabulary of a tokenizer whose every character is a token, as the likeliest sequence.

        Of unknown characters in a row llama.cpp makes one unknown token.
        """
        (step,) = _sequence(self.parts["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
        splits_all = step["type"] == "Split" and step["pattern"] in ({"Regex": r"[\s\S]"}, {"Regex": "."})
        added = {token["content"] for token in self.parts["added_tokens"]}
        vocab = self.parts["model"]["vocab"]
        unknown = self.parts["model"]["unk_token"]
        longer = [token for token in vocab if len(token) > 1 and token not in added and token != unknown]
        # Tokens of several characters that no character makes can only be special ones.
        longer = [token for token in longer if token not in self.tokenizer.all_special_tokens]
        if self.parts["normalizer"] or not splits_all or longer:
            raise self.refused("vocabulary of whole words")

        flags = {"add_space_prefix": False, "remove_extra_whitespaces": False}
        return self._completed("t5", "default", scores=dict.fromkeys(vocab, 0.0), flags=flags, warnings=warnings)

    def _adds_space(self) -> tuple[bool, list[str]]:
        """Return whether a blank is put before a text, and where llama.cpp puts one that transformers does not."""
        normalizers = _sequence(self.parts["normalizer"], "normalizers")
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepends = {"type": "Prepend", "prepend": SPACE}
        cutters = _sequence(self.parts["pre_tokenizer"], "pretokenizers")
        # Where blanks are replaced first, there are none left to cut at.
        cutters = [part for part in cutters if part.get("pattern") != {"String": " "} or replaces not in normalizers]

        if normalizers == [prepends, replaces] and not cutters:
            # transformers looks for such tokens in a text that has its blanks written already.
            later = [token["content"] for token in self._used_added_tokens() if token["normalized"]]
            return True, [f"llama.cpp puts a blank after {later[0]}, too"] if later else []
        if normalizers == [replaces] and not cutters:
            return False, []
        if not normalizers and len(cutters) == 1 and cutters[0]["type"] == "Metaspace" and not cutters[0].get("split"):
            scheme = cutters[0]["prepend_scheme"]
            places = {"always": "", "first": " and after every special token"}
            if scheme == "never":
                return False, []
            return True, [f"llama.cpp puts a blank before a text that begins with one{places[scheme]}, too"]
        raise self.refused("way to write blanks")

    # --- what all have -----------------------------------------------------------------------------------------------

    def _completed(
        self,
        model: str,
        words: str,
        *,
        warnings: list[str],
        scores: Mapping[str, float] | None = None,
        merges: tuple[str, ...] = (),
        flags: Mapping[str, bool] | None = None,
    ) -> Vocabulary:
        """Return the vocabulary of a kind, with every row's token, special tokens and the chat template."""
        import gguf

        texts = self._texts()
        kinds = self._kinds(texts, spells_bytes=model == "gpt2")
        # llama.cpp writes blanks of the two SentencePiece kinds as SentencePiece does, but not those of added tokens.
        plain = {gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED}
        tokens: list[str] = []
        for text, kind in zip(texts, kinds, strict=True):
            if model == "gpt2":
                tokens.append(text)
            else:
                tokens.append(text.replace(SPACE, " ") if kind in plain else text.replace(" ", SPACE))

        ranked: tuple[float, ...] = ()
        if scores is not None:
            # Tokens without a rank are made by no merge.
            last = min(scores.values(), default=0.0) - 1000.0
            ranked = tuple(scores.get(text, last) for text in texts)

        return Vocabulary(
            model=model,
            words=words,
            tokens=tuple(tokens),
            types=tuple(int(kind) for kind in kinds),
            scores=ranked,
            merges=merges,
            flags={**(flags or {}), **self._added_around()},
            special=self._special(),
            chat_template=self._chat_template(),
            warnings=tuple(warnings),
        )

    def _texts(self) -> list[str]:
        """Return the text of every row; a row without a token has a text that no tokenizer makes."""
        by_id = {token_id: token for token, token_id in self.tokenizer.get_vocab().items()}
        beyond = max(by_id, default=-1)
        if beyond >= self.n_tokens:
            raise ConfigError(
                f"export.format: gguf wants a row of the embedding for every token, and there are {self.n_tokens} rows "
                f"and the token {by_id[beyond]!r} with the id {beyond}; use export.format=seap"
            )
        return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(self.n_tokens)]

    def _kinds(self, texts: Sequence[str], *, spells_bytes: bool) -> list[Any]:
        """Return the ``gguf.TokenType`` of every row."""
        import gguf

        kinds = gguf.TokenType
        known = self.tokenizer.get_vocab()
        special = {token["content"] for token in self.parts["added_tokens"] if token["special"]}
        special |= {*self.tokenizer.all_special_tokens}
        added = {token["content"] for token in self.parts["added_tokens"]}
        bytes_ = set() if spells_bytes else {f"<0x{byte:02X}>" for byte in range(N_BYTES)}
        unknown = None if spells_bytes else self.tokenizer.unk_token

        by_row: list[Any] = []
        for text in texts:
            if text not in known:
                by_row.append(kinds.UNUSED)
            elif text == unknown:
                by_row.append(kinds.UNKNOWN)
            elif text in special:
                by_row.append(kinds.CONTROL)
            elif text in added:
                by_row.append(kinds.USER_DEFINED)
            else:
                by_row.append(kinds.BYTE if text in bytes_ else kinds.NORMAL)
        return by_row

    def _used_added_tokens(self) -> Iterator[Mapping[str, Any]]:
        """Yield the added tokens that a text or a template may hold."""
        # Masks and fillers are in no text that is answered.
        unused = {self.tokenizer.mask_token, self.tokenizer.pad_token} - {self.tokenizer.eos_token}
        yield from (token for token in self.parts["added_tokens"] if token["content"] not in unused)

    def _added_around(self) -> dict[str, bool]:
        """Return which tokens the tokenizer puts around a text, found by letting it do so.

        Raises ConfigError for others than a beginning and an end token.
        """
        ids = self.tokenizer("1")["input_ids"]
        inner = self.tokenizer("1", add_special_tokens=False)["input_ids"]
        starts = self._starts(ids, inner)
        before, after = ids[:starts], ids[starts + len(inner) :]
        bos = [self.tokenizer.bos_token_id]
        eos = [self.tokenizer.eos_token_id]
        if before not in ([], bos) or after not in ([], eos):
            raise self.refused("tokens around a text")
        return {"add_bos_token": before == bos, "add_eos_token": after == eos}

    def _starts(self, ids: Sequence[int], inner: Sequence[int]) -> int:
        for start in range(len(ids) - len(inner) + 1):
            if ids[start : start + len(inner)] == inner:
                return start
        raise self.refused("tokens around a text")

    def _special(self) -> dict[str, int]:
        """Return the ids of tokens with a meaning; llama.cpp stops at the end token and at a turn's end."""
        named = {
            "bos": self.tokenizer.bos_token_id,
            "eos": self.tokenizer.eos_token_id,
            "unknown": self.tokenizer.unk_token_id,
            "padding": self.tokenizer.pad_token_id,
        }
        special = {name: token_id for name, token_id in named.items() if token_id is not None}

        # Of others that end an answer the file has room for one; llama.cpp knows those of usual names.
        ends = [token_id for token_id in self._ends() if token_id != special.get("eos")]
        if ends and "eos" not in special:
            special["eos"] = ends.pop(0)
        if ends:
            special["eot"] = ends[0]
        return special

    def _ends(self) -> list[int]:
        """Return the ids of tokens that end an answer, by the generation config or else the config."""
        for name in ("generation_config.json", "config.json"):
            file = self.folder / name
            value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
            if value is not None:
                ids: list[int] = value if isinstance(value, list) else [value]
                return [token_id for token_id in ids if token_id < self.n_tokens]
        return []

    def _chat_template(self) -> str | None:
        template = self.tokenizer.chat_template
        # Several have names; the one for plain conversations is called so.
        return template.get("default") if isinstance(template, dict) else template


def _sequence(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps that a part of ``tokenizer.json`` consists of."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps: list[Mapping[str, Any]] = []
    for step in part[key]:
        steps += _sequence(step, key)
    return steps


def _step(part: Mapping[str, Any]) -> str:
    """Return what a step does that cuts a text into words: its pattern, or a word for it."""
    kind = part["type"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex", kind)
    # Where the first word of a text gets a blank, llama.cpp leaves it out.
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "byte_level with words" if part["use_regex"] else "byte_level"
    if kind == "Digits" and part["individual_digits"]:
        return "digits"
    return kind
