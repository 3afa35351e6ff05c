"""Text to token ids and back, as the checkpoint itself says: tokenizer.json, or rebuilt from GGUF metadata."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fallow.errors import ModelFileError, RequestError
from fallow.models.chat_template import ChatTemplate
from fallow.models.gguf import GgufFile
from fallow.models.gguf_tokenizer import tokenizer_from_gguf
from fallow.models.token_bytes import TokenBytes
from fallow.models.tokenizer_json import check_document, token_bytes_of

MAX_JSON_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
_MAX_EXTRA_TOKENS = 64  # that a post-processor may put around a text


class Tokenizer:
    """Token ids of a text, and the bytes of each token id.

    ``token_bytes[i]`` is what token ``i`` adds to the text, ``b""`` for special tokens, so that the text of any ids
    is ``b"".join(token_bytes[i] for i in ids).decode(errors="replace")``. ``vocab_size`` is its length; a model's
    embedding may have more rows. ``prefix`` and ``suffix`` are the ids that go before and after a text. ``backend`` is
    the ``tokenizers.Tokenizer`` beneath.
    """

    def __init__(
        self,
        document: dict[str, Any],
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Build from the content of a tokenizer.json. ``add_bos_token`` and ``add_eos_token`` replace what its
        post-processor puts around a text; None leaves it as it is. Raises ``ModelFileError`` where the
        document is not sound."""
        check_document(document)
        self.backend: tokenizers.Tokenizer = _guarded("tokenizer.json", _build_backend, json.dumps(document))
        for token in document["added_tokens"]:
            if self.backend.token_to_id(token["content"]) != token["id"]:  # the library numbers new texts itself
                text, number = token["content"], token["id"]
                raise ModelFileError(f"tokenizer.json is damaged: the token {text!r:.40} cannot have the id {number}.")
        special_ids = {token["id"] for token in document["added_tokens"] if token.get("special") is True}
        pieces, self._special_texts, self._strip_space = token_bytes_of(document, special_ids)
        self.vocab_size = vocab_size = len(pieces)
        self.bos_token_id = bos_token_id if bos_token_id is not None and bos_token_id < vocab_size else None
        self.eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < vocab_size)
        bos_ids = set() if self.bos_token_id is None else {self.bos_token_id}
        self.special_ids: frozenset[int] = frozenset(special_ids | self.eos_token_ids | bos_ids)
        for i in self.special_ids - special_ids:
            self._special_texts[i] = pieces[i].decode(errors="replace")
            pieces[i] = b""
        self.token_bytes = TokenBytes(pieces)
        self._literal_backend: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        self.prefix, self.suffix = self._extra_tokens(add_bos_token, add_eos_token)
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            self.chat_template = ChatTemplate(
                chat_template,
                bos_token=self.token_text(self.bos_token_id),
                eos_token=self.token_text(min(self.eos_token_ids, default=None)),
            )

    def check_vocabulary(self, vocab_size: int, model: str) -> None:
        """Raise ``ModelFileError`` where this tokenizer does not belong to a model of ``vocab_size`` rows.

        Special tokens of what is not served, such as Gemma 3's image token, may lie beyond the rows: no text needs
        them, and a prompt that holds one is refused by itself.
        """
        needed = self.eos_token_ids | {self.bos_token_id}
        for i in range(vocab_size, self.vocab_size):
            if self.token_bytes[i] or i in needed:
                raise ModelFileError(
                    f"The tokenizer of {model} can give the token {i} ({self.token_text(i)!r:.40}), but the model has "
                    f"only {vocab_size} tokens: put the tokenizer that the model was trained with beside its weights."
                )

    def token_text(self, token_id: int | None) -> str:
        """The token as written in a prompt; special tokens too. An empty string for None."""
        if token_id is None or not 0 <= token_id < self.vocab_size:
            return ""
        return self._special_texts.get(token_id) or self.token_bytes[token_id].decode(errors="replace")

    def encode(self, text: str, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        ``add_special_tokens`` puts the tokens around it that the checkpoint asks for (a beginning-of-sequence token,
        mostly); pass False for a rendered chat template, which holds them as text already. ``allow_special=False``
        reads text such as ``<|im_end|>`` as plain characters instead of as the special token.
        """
        backend = self.backend if allow_special else self._literal()
        try:
            ids = _guarded("this text", lambda: backend.encode(text, add_special_tokens=False).ids)
        except ModelFileError as error:
            raise RequestError(
                f"The text cannot be tokenized: {error.__cause__}; is it valid Unicode?", param="prompt"
            ) from error
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else list(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel: for corpora. Nothing is put around a text, and special tokens in it are
        plain characters. Raises ``ModelFileError`` where a text cannot be tokenized."""
        encodings = _guarded("this tokenizer", self._literal().encode_batch_fast, texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; ids beyond the vocabulary add nothing. Bytes that are not UTF-8 become U+FFFD."""
        if skip_special_tokens:
            pieces = [self.token_bytes[i] for i in ids if 0 <= i < self.vocab_size]
        else:
            pieces = [
                self._special_texts[i].encode() if i in self._special_texts else self.token_bytes[i]
                for i in ids
                if 0 <= i < self.vocab_size
            ]
        text = b"".join(pieces).decode(errors="replace")
        # SentencePiece puts a space before a text, so one is taken away again.
        return text[1:] if self._strip_space and text.startswith(" ") else text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """``ChatTemplate.render`` of ``needed_chat_template``."""
        return self.needed_chat_template().render(messages, **options)

    def needed_chat_template(self) -> ChatTemplate:
        """The chat template, or a ``RequestError`` that says what to do where the model has none."""
        if self.chat_template is None:
            raise RequestError(
                "This model has no chat template: continue a text instead (/v1/completions, Engine.generate, "
                "fallow run --raw), or put a chat_template.jinja into the model's folder.",
                param="messages",
            )
        return self.chat_template

    def _literal(self) -> tokenizers.Tokenizer:
        """A second backend in which special tokens are plain text: the switch is a property of the whole object."""
        with self._lock:
            if self._literal_backend is None:
                backend: tokenizers.Tokenizer = _guarded("tokenizer.json", _build_backend, self.backend.to_str())
                backend.encode_special_tokens = True
                self._literal_backend = backend
            return self._literal_backend

    def _extra_tokens(self, add_bos: bool | None, add_eos: bool | None) -> tuple[list[int], list[int]]:
        """The ids that go before and after a text, found by running the post-processor once."""
        plain = _guarded("tokenizer.json", lambda: self.backend.encode("a", add_special_tokens=False).ids)
        whole = _guarded("tokenizer.json", lambda: self.backend.encode("a", add_special_tokens=True).ids)
        extra = len(whole) - len(plain)
        starts = [i for i in range(extra + 1) if whole[i : i + len(plain)] == plain]
        if not starts or extra > _MAX_EXTRA_TOKENS or any(not 0 <= i < self.vocab_size for i in whole):
            raise ModelFileError("The post_processor of tokenizer.json does more than put a few tokens around a text.")
        start = starts[0] if plain else extra
        prefix, suffix = whole[:start], whole[start + len(plain) :]
        if add_bos is not None or add_eos is not None:
            prefix = [self.bos_token_id] if add_bos and self.bos_token_id is not None else []
            suffix = [min(self.eos_token_ids)] if add_eos and self.eos_token_ids else []
        return prefix, suffix


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, of a folder with a tokenizer.json, or of a folder that holds one GGUF file.

    Raises ``ModelFileError`` where there is none or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return _from_folder(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelFileError(
                f"There is no tokenizer.json in {path}: convert the tokenizer with transformers "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) or name one GGUF file."
            )
        path = files[0]
    if not path.is_file():
        raise ModelFileError(f"{path} is neither a GGUF file nor a folder with a tokenizer.json.")
    parts = tokenizer_from_gguf(GgufFile(path).metadata)
    return Tokenizer(
        parts.document,
        bos_token_id=parts.bos_token_id,
        eos_token_ids=parts.eos_token_ids,
        add_bos_token=parts.add_bos_token,
        add_eos_token=parts.add_eos_token,
        chat_template=parts.chat_template,
    )


def _from_folder(folder: Path) -> Tokenizer:
    document = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    names = {**_read_json(folder / "special_tokens_map.json", optional=True), **config}
    check_document(document)
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocab = document["model"]["vocab"]
    ids = (vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}) | ids
    bos = ids.get(_token_name(names.get("bos_token")))
    eos = {ids[name] for name in (_token_name(names.get("eos_token")),) if name in ids}
    for file in ("generation_config.json", "config.json"):
        value = _read_json(folder / file, optional=True).get("eos_token_id")
        eos.update(i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
    return Tokenizer(
        document,
        bos_token_id=bos,
        eos_token_ids=eos,
        chat_template=_folder_template(folder, config),
    )


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file, MAX_TEMPLATE_BYTES)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0] if named else None
    return template if isinstance(template, str) else None


def _token_name(value: object) -> str | None:
    if isinstance(value, dict):  # an AddedToken written out
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_text(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise ModelFileError(f"{path} is larger than {limit} bytes, too large to be what it should be.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is damaged: it is not UTF-8 text.") from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is damaged: a JSON object is expected.")
    return value


def _build_backend(document: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(document)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _guarded(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call into the tokenizers library, whose panics arrive as exceptions that are not ``Exception``."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise ModelFileError(f"{what} cannot be used: {error}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{what} cannot be used: the tokenizer library gave up on it ({error}).") from error
