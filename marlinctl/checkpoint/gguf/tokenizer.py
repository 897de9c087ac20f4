"""The tokenizer inside a GGUF file, rebuilt as tokenizer.json, tokenizer_config.json and chat_template.jinja.

Two kinds occur. Byte-level BPE ("gpt2") comes with its merges, but the rule that cuts text into words before any merge is
only a name, `tokenizer.ggml.pre`; SentencePiece BPE ("llama") comes without merges: they follow from the vocabulary, because
a merge is a way to cut a token into two tokens, and the token's score (Gemma: its place) is the merge's rank.

transformers can read these files too, but takes any unknown `pre` for GPT-2's rule: SmolLM's digits, which must stay
single, and Qwen's normalization to NFC are lost without a word. Here an unknown rule is refused: a tokenizer that is slightly
wrong gives a model that is slightly worse, without any error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.gguf.header import GgufHeader
from marlinctl.errors import BadInput
from marlinctl.system.files import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPACE = "\u2581"  # how SentencePiece writes a space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)


@dataclass(frozen=True, slots=True)
class _WordRule:
    """How byte-level BPE cuts text into words."""

    split: str | None = None  # None: GPT-2's rule, which the tokenizers library has built in
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say


WORD_RULES: Mapping[str, _WordRule] = {
    "gpt-2": _WordRule(),
    "smollm": _WordRule(single_digits=True),
    "starcoder": _WordRule(single_digits=True),
    "refact": _WordRule(single_digits=True),  # Granite 3 too
    "qwen2": _WordRule(split=_QWEN2, nfc=True),
    "llama-bpe": _WordRule(split=_CL100K, ignore_merges=True),
    "dbrx": _WordRule(split=_CL100K),  # OLMo 2 and Phi-4
    "tekken": _WordRule(split=_TEKKEN, ignore_merges=True),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]
    facts: Mapping[str, Any]

    def named(self, key: str) -> str | None:
        """The token whose id is `tokenizer.ggml.KEY_token_id`."""
        number = self.facts.get(f"tokenizer.ggml.{key}_token_id")
        return self.tokens[number] if isinstance(number, int) and 0 <= number < len(self.tokens) else None


def tokenizer_files(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, str]:
    """File name -> content."""
    vocabulary = _vocabulary(header)
    model = header.facts.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(vocabulary, header)
        adds_bos = header.facts["tokenizer.ggml.pre"] in ("llama-bpe", "tekken")
    elif model == "llama":
        tokenizer = _sentencepiece(vocabulary, header, str(header.facts["general.architecture"]))
        adds_bos = True
    else:
        raise _refuse(header, f"the tokenizer model {shown(repr(model), 40)} is not supported (gpt2 and llama are)")
    adds_bos = bool(header.facts.get("tokenizer.ggml.add_bos_token", adds_bos))  # files older than the flag leave it out
    adds_eos = bool(header.facts.get("tokenizer.ggml.add_eos_token", False))
    _add_special(tokenizer, vocabulary, rstrip=header.facts["general.architecture"] == "phi3" and model == "llama")
    _add_template(tokenizer, vocabulary.named("bos") if adds_bos else None, vocabulary.named("eos") if adds_eos else None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
    }
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if vocabulary.named(key) is not None:
            settings[name] = vocabulary.named(key)
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False)}
    template = header.facts.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    return files


def _vocabulary(header: GgufHeader) -> _Vocabulary:
    tokens, kinds = header.facts.get("tokenizer.ggml.tokens"), header.facts.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise _refuse(header, "the file holds no tokenizer (tokenizer.ggml.tokens)")
    if kinds is None:
        kinds = [_NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise _refuse(header, "tokenizer.ggml.token_type does not belong to tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise _refuse(header, "tokenizer.ggml.tokens holds a token twice")
    return _Vocabulary(tokens, kinds, header.facts)


def _byte_level(vocabulary: _Vocabulary, header: GgufHeader) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = header.facts.get("tokenizer.ggml.pre")
    rule = WORD_RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise _refuse(header, f"the word rule tokenizer.ggml.pre = {shown(repr(name), 40)} is not supported ({', '.join(WORD_RULES)} are)")
    raw = header.facts.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in raw] if isinstance(raw, list) and all(isinstance(m, str) for m in raw) else None
    vocab = _ids(vocabulary)
    if pairs is None or not all(len(pair) == 2 and pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab for pair in pairs):
        raise _refuse(header, "tokenizer.ggml.merges is missing or does not belong to the tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False, ignore_merges=rule.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary, header: GgufHeader, architecture: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    gemma = architecture in ("gemma2", "gemma3")
    scores = header.facts.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise _refuse(header, "tokenizer.ggml.scores is missing or does not belong to the tokens")
    if gemma:  # runs of spaces are stored as spaces; merges follow the order of the vocabulary, runs of white space come first
        tokens = [_SPACE * len(t) if t.isspace() and set(t) == {" "} else t for t in vocabulary.tokens]
        vocabulary = _Vocabulary(tokens, vocabulary.kinds, vocabulary.facts)
        scores = [math.inf if kind == _USER_DEFINED else -i for i, kind in enumerate(vocabulary.kinds)]
    vocab = _ids(vocabulary)
    merges = _merges(vocab, {token: scores[i] for token, i in vocab.items()}, vocabulary)
    unknown = vocabulary.named("unknown")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", _SPACE)
    prefix = bool(header.facts.get("tokenizer.ggml.add_space_prefix", not gemma))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    """Token -> id, without the rows that only pad the embedding."""
    pairs = enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    return {token: i for i, (token, kind) in pairs if not (kind == _UNUSED and token == f"[PAD{i}]")}


def _merges(vocab: Mapping[str, int], scores: Mapping[str, float], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best score first; control tokens take no part."""
    control = {token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == _CONTROL}
    found = []
    for token in vocab:
        if token in control:
            continue
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab and left not in control and right not in control:
                found.append((-scores[token], -len(left), -len(right), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, rstrip: bool) -> None:
    """Control tokens are special; user-defined ones are matched whole too, but stay in decoded text.

    `rstrip`: Phi-3's tokens, but for the first ones, take the white space behind them along.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab(with_added_tokens=False)
    control, defined = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        token = _SPACE * len(token) if token not in known and set(token) == {" "} else token
        takes_space = rstrip and token not in ("<unk>", "<s>", "<|endoftext|>")
        if kind == _CONTROL:
            control.append(AddedToken(token, special=True, normalized=False, rstrip=takes_space))
        elif kind == _USER_DEFINED and token:
            defined.append(AddedToken(token, special=False, normalized=False, rstrip=takes_space))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(defined)


def _add_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    if bos is None and eos is None:
        return
    before, after = [bos] if bos else [], [eos] if eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )


def _refuse(header: GgufHeader, what: str) -> BadInput:
    return BadInput("E320", what, where=str(header.path), fix="use the model's safetensors folder, which brings its own tokenizer")
