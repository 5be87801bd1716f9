"""The ways in which llama.cpp cuts text into words, and how we find the one that a tokenizer uses.

llama.cpp knows a way to cut text by its name, not by its regular expression: each name stands for a list of expressions
in ``llm_tokenizer_bpe`` of its ``src/llama-vocab.cpp`` (read at llama-cpp-python 0.3.36). Each expression in turn cuts
the pieces that the one before left. :data:`PRE_TOKENIZERS` states these lists. Left out are names that stand
for code of their own (kimi-k2, afmoe, superbpe, tiny_aya), that do not work on bytes (gemma4, sarvam-moe, whitespace),
or whose tokenizers change the text first (youtu, deepseek-llm, spark2_5).

Which name fits a ``tokenizer.json`` is found by trial: the tokenizer and each way cut a text that has everything in
which the ways differ, and the pieces must be equal. So a tokenizer that writes the same cut in another form is
recognised too.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sbn_lightning.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Way(NamedTuple):
    """One way to cut text.

    Attributes:
        name: The name that llama.cpp gives it; the first of several names for the same way.
        patterns: The regular expressions, in their order.
        ignores_merges: Whether a word that is a token stays whole, whatever the merges say.
        also: Other names for the same cut.
    """

    name: str
    patterns: tuple[str, ...]
    ignores_merges: bool = False
    also: tuple[str, ...] = ()


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_CHAMELEON_SIGNS = r"[\p{P}!-/:-@\[-`{-~]"
_ROUND_SPACES = "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))


def _tiktoken(digits: str, word: str = _WORD, short: str = _SHORT, signs: str = _SIGNS, spaces: str = _SPACES) -> str:
    """The expression that most models since GPT-4 share, with the parts in which they differ."""
    return "|".join(part for part in (short, word, digits, signs, spaces) if part)


def _cased(contraction: str) -> str:
    """Words that end where a lower-case letter is followed by an upper-case one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{contraction}|{start}{_UPPER}+{_LOWER}*{contraction}"


_CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_QWEN2 = _tiktoken(r"\p{N}")
_LLAMA_3 = _tiktoken(r"\p{N}{1,3}")

# The names that say least about a model come first: a tokenizer gets the first name that fits.
PRE_TOKENIZERS = (
    Way("gpt-2", (GPT_2,), also=("phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4",
                                "modern-bert", "trillion", "granite-docling", "roberta-bpe", "jina-v2-code")),
    Way("smollm", (r"\p{N}", GPT_2), also=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
                                           "mellum2")),
    Way("qwen2", (_QWEN2,), also=("stablelm2", "megrez", "deepseek-r1-qwen", "kormo", "f2llmv2", "hunyuan", "grok-2",
                                  "solar-open", "bailingmoe", "bailingmoe2", "llada-moe")),
    Way("dbrx", (_LLAMA_3,), also=("smaug-bpe", "chatglm-bpe")),
    Way("llama-bpe", (_LLAMA_3,), True, ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                                         "glm4", "glm5", "jina-v5-nano")),
    Way("qwen35", (_tiktoken(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                             signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
    Way("gpt-4o", (_tiktoken(r"\p{N}{1,3}", _cased(_SHORT + "?"), "", _CASED_SIGNS),),
        also=("llama4", "kanana2", "talkie", "minimax-m2")),
    Way("tekken", (_tiktoken(r"\p{N}", _cased(""), "", _CASED_SIGNS),), True),
    Way("seed-coder", (_tiktoken(r"\p{N}{1}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    Way("exaone-moe", (_tiktoken(r"\p{N}", r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                                 signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)),
    Way("minicpm5", (r"\p{N}{1,3}", _tiktoken(r"\p{N}+")), True),
    Way("ufakzeka", (_tiktoken(r"\p{N}", short=""),)),
    Way("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    Way("jais-2", (_tiktoken(r"\p{N}{1,3}", spaces=r"\s*[\r\n]+" + _ROUND_SPACES + r"|\s{1}"),)),
    Way("deepseek-v3", (r"\p{N}{1,3}", _HAN_KANA, _PUNCTUATED + r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES),
        also=("hunyuan-dense", "joyai-llm", "hy_v4")),
    Way("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    Way("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, "[0-9][0-9][0-9]")),
    Way("viking", (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}")),
    Way("bloom", (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",), also=("poro-chat", "gpt3-finnish")),
    Way("chameleon", (r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
                      _CHAMELEON_SIGNS, GPT_2)),
)  # fmt: skip

# Numbers of several lengths, contractions in both cases, runs of spaces and line ends, letters with marks, mixed case,
# scripts without spaces, signs before letters and before line ends.
PROBE = (
    "Hello, world! It's 3 o'clock, I'LL say we're done; they've 12 345 6789 1234567 things.\n\n\n  indented"
    "\n\t\ttabs \t   x = foo_bar(baz)[0] + 'q' * 1000000;  // comment\r\n\r\nif (a&&b) { return !c; }"
    " \n  \n   \n      end    "
    "HTTPServer camelCase XMLHttpRequest iPhone ÉCOLE naïve Straße e\u0301te\u0301 हिन्दी नमस्ते ไทย ภาษา "
    "日本語のテキスト 中文字符测试 한국어 텍스트 русский текст ελληνικά עברית العربية١٢٣ Ⅷ ½ x² 🙂🙂👍🏽 "
    "<sentinel:3> @user #tag $5.00 50% a/b/c --flag ...wait… “quoted” \u2018single\u2019 don\u2019t a.b,c"
    " e.g. \\n ^~`|<=> 'S 'T\n/\n/x ab'tis of'reading  12   345 "
    "  double  spaces   triple            many                                                             lots "
    "\u3000wide\u3002\uff0c\u3001 \u06d4\u060c end.\n"
)


def name_of(tokenizer: Tokenizer, ignores_merges: bool) -> str:
    """Return llama.cpp's name for the way in which a byte-level BPE tokenizer cuts text.

    Args:
        tokenizer: The tokenizer.
        ignores_merges: Whether the model of the tokenizer has ``ignore_merges``.

    Raises:
        ConfigError: If llama.cpp has no name for the way.
    """
    pieces = _cut(tokenizer.pre_tokenizer)
    adds_space = tokenizer.pre_tokenizer is not None and tokenizer.pre_tokenizer.pre_tokenize_str("a")[0][0] != "a"
    fitting = [] if adds_space else [way for way in PRE_TOKENIZERS if _cut_by(way.patterns) == pieces]
    for way in fitting:
        if way.ignores_merges == ignores_merges:
            return way.name
    if fitting:
        does = "keeps a word that is a token whole" if ignores_merges else "builds every word from merges"
        raise ConfigError(
            f"llama.cpp cuts text as {fitting[0].name} does, but this tokenizer {does} (ignore_merges="
            f"{str(ignores_merges).lower()}); use --format packed or hf-bitnet"
        )
    raise ConfigError(
        f"llama.cpp has no known name for how this tokenizer cuts text ({_described(tokenizer)}); known are the ways "
        f"of {', '.join(way.name for way in PRE_TOKENIZERS)}, and SentencePiece; use --format packed or hf-bitnet"
    )


def way_named(name: str) -> Way | None:
    """The way with a name of llama.cpp, or None if it is not known here."""
    return next((way for way in PRE_TOKENIZERS if name == way.name or name in way.also), None)


def pre_tokenizer_of(way: Way) -> Any:
    """The pre-tokenizer of the ``tokenizers`` library that cuts text in a way and turns bytes into characters."""
    from tokenizers import Regex, pre_tokenizers

    ends_with_gpt_2 = way.patterns[-1] == GPT_2  # ByteLevel has this expression built in.
    patterns = way.patterns[:-1] if ends_with_gpt_2 else way.patterns
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ends_with_gpt_2))
    return pre_tokenizers.Sequence(steps)


def _cut(pre_tokenizer: Any) -> list[tuple[int, int]]:
    """Where the probe is cut: the start and the end of each piece."""
    if pre_tokenizer is None:
        return [(0, len(PROBE))]
    return [place for _, place in pre_tokenizer.pre_tokenize_str(PROBE)]


@cache
def _cut_by(patterns: tuple[str, ...]) -> list[tuple[int, int]]:
    from tokenizers import Regex, pre_tokenizers

    return _cut(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]))


def _described(tokenizer: Tokenizer) -> str:
    """The steps of a pre-tokenizer, for a message."""
    import json

    steps = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    told = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Split":
            told.append(str(step["pattern"].get("Regex", step["pattern"].get("String", "")))[:80])
        elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            told.append("ByteLevel with add_prefix_space")
        elif step.get("type") != "ByteLevel" or step.get("use_regex", True):
            told.append(str(step.get("type")))
    return ", ".join(told) or "not at all"
