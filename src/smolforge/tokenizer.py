"""Text to tokens and back: load, train, encode, and decode as a stream.

A thin layer over the `tokenizers` library. The files are those that transformers reads (tokenizer.json,
tokenizer_config.json, special_tokens_map.json), so a checkpoint's tokenizer needs no conversion. A tokenizer trained
here has the form of SmolLM2's: byte-level BPE, single digits, `<|endoftext|>` = 0, the same seventeen special tokens.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge import hub
from smolforge.errors import BadInput, CheckpointError
from smolforge.files import read_json
from smolforge.formatting import replace_lone_surrogates
from smolforge.gguf_file import gguf_tokenizer, is_gguf, open_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
# The special tokens of HuggingFaceTB/cosmo2-tokenizer, in the order of their ids.
SPECIAL_TOKENS = (
    END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PIECE = 1 << 20  # characters of a text that a tokenizer is trained on at a time
LONGEST_WORD = 1000  # characters without a blank that it is trained on: time grows with the square of them
MAX_FILE_BYTES = 256 << 20  # a tokenizer.json of the largest public vocabularies is about 35 MB
MAX_TEMPLATE_BYTES = 1 << 20


class Tokenizer:
    """A loaded tokenizer over a `backend` of tokenizers. `encode` reads special tokens in text as plain text."""

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None) -> None:
        self.backend = backend
        # A document that quotes "<|endoftext|>" must not end there: special tokens in text are plain text.
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        self.config = config or {}  # the contents of tokenizer_config.json
        self.eos_id = self._special_id("eos_token", END_OF_TEXT)  # ends a document
        bos = self.backend.token_to_id(_token_text(self.config.get("bos_token")))
        self.bos_id = self.eos_id if bos is None else bos  # begins a text where the tokenizer names one
        # Jinja source of the chat template; None for a base model.
        self.chat_template: str | None = _template(self.config.get("chat_template"))
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Tokenizer:
        """Load a tokenizer from a directory, a GGUF file, or a Hub id (`OWNER/NAME[@REVISION]`).

        Raises:
            CheckpointError: the directory has no tokenizer.json, or it cannot be read.
        """
        if hub.GGUF_ADDRESS.match(str(source)):
            source = hub.fetch_gguf(str(source))
        if is_gguf(source):
            return cls(*gguf_tokenizer(open_gguf(source)))
        directory = Path(source)
        if not directory.is_dir():
            if not hub.is_model_id(str(source)):
                known = "a directory with tokenizer.json, a Hub id such as HuggingFaceTB/cosmo2-tokenizer"
                hint = f"Give {known}, or {{train: {{vocab_size: 4096}}}}."
                raise CheckpointError(f"no such directory: {source}", field="tokenizer", hint=hint)
            directory = hub.fetch_model(str(source), patterns=list(TOKENIZER_FILES))
        path = directory / "tokenizer.json"
        if not path.is_file():
            slow = any((directory / name).is_file() for name in ("vocab.json", "vocab.txt", "tokenizer.model"))
            make = f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
            hint = f"transformers makes one of the files there: {make}" if slow else None
            raise CheckpointError(f"{directory} has no tokenizer.json", field="tokenizer", hint=hint)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", field="tokenizer")
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except BaseException as error:  # the library's PanicException is not an Exception, and neither is a signal
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{path} is not a tokenizer: {error}", field="tokenizer") from None
        config, specials = (
            read_json(file, limit=MAX_FILE_BYTES) if (file := directory / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):  # some files name them only in the map
            if not config.get(key) and specials.get(key):
                config[key] = specials[key]
        template = directory / "chat_template.jinja"  # where transformers 5 keeps it, before tokenizer_config.json
        if template.is_file() and template.stat().st_size <= MAX_TEMPLATE_BYTES:
            config["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
        return cls(backend, config)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of SmolLM2's form on `texts`.

        Raises:
            BadInput: `vocab_size` is less than the 256 bytes and 17 special tokens need.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            hint = f"256 bytes and {len(SPECIAL_TOKENS)} special tokens need at least {least}."
            raise BadInput(f"{vocab_size} is too small", field="tokenizer.train.vocab_size", hint=hint)
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        # The trainer takes a hundred bytes for each word of a text at once, so a huge one comes in pieces.
        pieces = (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE))
        backend.train_from_iterator(map(_with_blanks, pieces), trainer)
        return cls(backend)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: the smallest vocabulary a model needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def text_vocab_size(self) -> int:
        """As `vocab_size`, without special tokens that neither begin nor end a text: no text has them."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True).values()
        return max({*vocabulary} - self.special_ids | {self.eos_id, self.bos_id}) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added at either end. `encode_prompt` begins as the tokenizer does."""
        return self.backend.encode(replace_lone_surrogates(text), add_special_tokens=False).ids

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer puts before a text: BOS with Llama 2 and 3, nothing with most others."""
        plain, whole = (self.backend.encode("x", add_special_tokens=added).ids for added in (False, True))
        return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain), [])

    def encode_prompt(self, text: str, *, special_tokens: bool = False, prefix: bool = True) -> list[int]:
        """Token ids of a text to continue, which begin as the tokenizer begins a text.

        Args:
            special_tokens: read special tokens in the text as such; a prefix that it already begins with is not added.
            prefix: False leaves `prefix_ids` out.
        """
        ids = self.encode_with_special_tokens(text) if special_tokens else self.encode(text)
        begun = special_tokens and ids[: len(self.prefix_ids)] == self.prefix_ids
        return ids if begun or not prefix else [*self.prefix_ids, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts at once, in parallel threads."""
        texts = [replace_lone_surrogates(text) for text in texts]
        return [encoded.ids for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Token ids of a trusted text, such as a rendered chat template, in which special tokens are recognised."""
        return self._with_special_tokens.encode(replace_lone_surrogates(text), add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins, as `ChatTemplate.encode`."""
        from smolforge.chat_template import ChatTemplate

        return ChatTemplate(self).encode(messages, **options)

    def encode_with_offsets(self, text: str) -> Any:
        """As `encode_with_special_tokens`; `ids`, and in `offsets` the characters (first, end) of each."""
        return self._with_special_tokens.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _with_special_tokens(self) -> Backend:
        # A second backend: changing the flag of the first would affect other threads that encode at the same time.
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import Sequence

        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        backend.post_processor = Sequence([])  # which adds tokens, and may take spaces out of the offsets
        return backend

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The token as its vocabulary spells it (byte-level: `Ġ` is a space), or '' for an unused id."""
        return self.backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; a character may be spread over several tokens."""
        return self._bytes_of_tokens[token_id] if 0 <= token_id < len(self._bytes_of_tokens) else b""

    @functools.cached_property
    def _bytes_of_tokens(self) -> list[bytes]:
        added = {i: t.content.encode() for i, t in self.backend.get_added_tokens_decoder().items()}
        spell = _byte_level_bytes if "ByteLevel" in str(self.backend.decoder) else _sentencepiece_bytes
        return [added.get(i) or spell(self.token_text(i)) for i in range(self.vocab_size)]

    def save(self, directory: Path, *, max_length: int = 8192) -> None:
        """Write the three files that transformers' `PreTrainedTokenizerFast` reads.

        Args:
            max_length: `model_max_length` in tokens, of a tokenizer that does not name one itself.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # `encode_special_tokens` is not part of the file: transformers uses its own default.
        self.backend.save(str(directory / "tokenizer.json"))
        specials = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.token_text(self.eos_id))
        defaults = {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
        own = {"add_prefix_space": False, **specials, **defaults, **self.config}
        config = {**own, "tokenizer_class": "PreTrainedTokenizerFast"}
        files = {"tokenizer_config.json": config, "special_tokens_map.json": {key: config[key] for key in specials}}
        for name, value in files.items():
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(text, encoding="utf-8")

    def _special_id(self, key: str, default: str) -> int:
        text = _token_text(self.config.get(key) or default)
        found = self.backend.token_to_id(text)
        if found is None:
            hint = "tokenizer_config.json must name a token of tokenizer.json."
            raise BadInput(f"{key} {text!r} is not in the vocabulary", field="tokenizer", hint=hint)
        return found


class StreamDecoder:
    """Decodes tokens as they arrive, one whole character after the other.

    A token's bytes go through Python's incremental UTF-8 decoder, which keeps the bytes of an unfinished character and
    replaces bytes that cannot become one. The cost per token is constant.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; '' for a special token and while a character is unfinished."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The rest at the end; an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    # The byte-level alphabet of GPT-2 (openai/gpt-2, encoder.py, bytes_to_unicode): printable bytes stand for
    # themselves, the others take the characters from U+0100 on, in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_char()
    # A token with a character outside the alphabet stands for itself, as in the library's decoder.
    return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()


def _with_blanks(text: str) -> str:
    """`text` with a blank after each `LONGEST_WORD` characters that have none, as base64 or a genome has."""
    if max(map(len, text.split()), default=0) <= LONGEST_WORD:
        return text
    return re.sub(rf"\S{{{LONGEST_WORD}}}", r"\g<0> ", text)


def _token_text(token: Any) -> str:
    # tokenizer_config.json has a special token as text or as an object with its `content`.
    return replace_lone_surrogates(str(token.get("content") if isinstance(token, dict) else token or ""))


def _template(value: Any) -> str | None:
    # Some files hold several templates, each with a name.
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _sentencepiece_bytes(token: str) -> bytes:
    # Byte fallback spells a lone byte as <0xE2>; U+2581 is a space.
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
