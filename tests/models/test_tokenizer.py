from __future__ import annotations

import copy
import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fallow.errors import FallowError, ModelFileError
from fallow.models.gguf_tokenizer import tokenizer_from_gguf
from fallow.models.token_bytes import TokenBytes
from fallow.models.tokenizer import Tokenizer, load_tokenizer

SAMPLES = [
    "Hello world",
    "  leading, trailing  ",
    "def f(x):\n    return x ** 2  # square\n\n\n\tif not x:\r\n",
    "naïve façade — “quotes” … 中文字符 日本語 한국어 العربية",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\ufeff \x00\x07",
    "1234567890 3.14159 1e-9 ½ ²",
    " " * 40 + "x" + "\n" * 9,
    "I'll we've they'd it's I'M",
    "",
]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog doesn't mind; it was sleeping in the sun. " * 20
# Of the tokenizer.json that SmolLM2 was published with.
PUBLISHED_IDS = {
    "Hello world": [19556, 905],
    "def f(x):\n    return x ** 2": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34],
    "naïve 中文 🙂": [3546, 46494, 216, 28589, 29184, 47526],
    "a  12 ½": [81, 256, 33, 34, 216, 16738],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}
BOS_BEFORE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE of some 400 tokens with <s> and </s>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


@pytest.fixture
def folder(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"})
    )
    return tmp_path


def gguf_gpt2(backend: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    document = json.loads(backend.to_str())
    vocab = sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocab) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **more,
    }


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    parts = tokenizer_from_gguf(metadata)
    return Tokenizer(
        parts.document,
        bos_token_id=parts.bos_token_id,
        eos_token_ids=parts.eos_token_ids,
        add_bos_token=parts.add_bos_token,
        add_eos_token=parts.add_eos_token,
        chat_template=parts.chat_template,
    )


def sentencepiece_metadata(pieces: int = 300) -> dict[str, Any]:
    """A vocabulary as SentencePiece's BPE makes it: every piece has the score of the order in which it was merged."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=pieces, show_progress=False))
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    learned = sorted(vocab, key=vocab.get)
    merged = [piece for piece in learned if len(piece) > 1]
    single = [piece for piece in learned if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(merged))] + [-1e9] * len(single),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(single)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_reference(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE, written down plainly: merge the neighbours with the best score until none is left."""
    ids = {piece: i for i, piece in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    pieces = list(("\u2581" + text if text else "").replace(" ", "\u2581"))
    while True:
        candidates = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not candidates:
            break
        _, i = min(candidates)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    result = []
    for piece in pieces:
        result += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return result


def test_real_gguf(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1
    for text, ids in PUBLISHED_IDS.items():
        assert tokenizer.encode(text) == ids
    assert tokenizer.encode("<|im_end|>", allow_special=False) == [44, 108, 306, 79, 486, 108, 46]
    for sample in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.slow
def test_real_gguf_gives_the_published_ids(smollm2_gguf: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # The converter of transformers forgets that SmolLM2 cuts numbers into digits before anything else.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = load_tokenizer(smollm2_gguf)
    text = (shared_data / "wikitext-2-test.txt").read_text(encoding="utf-8")[:400_000]
    source = Path(__file__).read_text(encoding="utf-8")
    special = "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>"
    for sample in (text, source, special, *SAMPLES):
        assert tokenizer.encode(sample) == reference.encode(sample)
        assert tokenizer.decode(tokenizer.encode(sample, allow_special=False)) == sample
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1
    assert tokenizer.encode("<|im_end|>", allow_special=False) != [2]


def test_gguf_and_json_agree(byte_level: tokenizers.Tokenizer, folder: Path) -> None:
    rebuilt, loaded = from_gguf(gguf_gpt2(byte_level)), load_tokenizer(folder)
    for sample in [*SAMPLES, TEXT, "<s>x</s>"]:
        assert rebuilt.encode(sample) == loaded.encode(sample) == byte_level.encode(sample).ids
    assert rebuilt.token_bytes == loaded.token_bytes
    assert rebuilt.special_ids == loaded.special_ids == {0, 1}
    assert rebuilt.eos_token_ids == loaded.eos_token_ids == {1}


def test_folder_matches_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain = json.loads((folder / "tokenizer.json").read_text())
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    for post_processor in (None, BOS_BEFORE):
        (folder / "tokenizer.json").write_text(json.dumps(plain | {"post_processor": post_processor}))
        reference, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        for sample in SAMPLES:
            assert tokenizer.encode(sample) == reference.encode(sample)
            assert tokenizer.encode(sample, False) == reference.encode(sample, add_special_tokens=False)


def test_sentencepiece_matches_the_algorithm() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = from_gguf(metadata)
    rng = random.Random(0)
    words = TEXT.split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(200)]
    texts += ["".join(rng.choices("the quickbrown  ", k=30)) for _ in range(200)]
    for text in [*texts, *SAMPLES]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == sentencepiece_reference(metadata, text), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == [1, *ids]


def test_sentencepiece_flags() -> None:
    metadata = sentencepiece_metadata() | {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    tokenizer = from_gguf(metadata)
    ids = tokenizer.encode("the fox")
    assert ids[-1] == 2
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == b"the fox"
    assert tokenizer.decode(tokenizer.encode(" the fox")) == " the fox"


def test_token_bytes_join_to_the_text(folder: Path) -> None:
    for tokenizer, before in ((load_tokenizer(folder), ""), (from_gguf(sentencepiece_metadata()), " ")):
        for sample in filter(None, SAMPLES):
            ids = tokenizer.encode(sample, allow_special=False)
            assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == before + sample
            assert tokenizer.decode(ids) == sample
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_token_bytes_are_a_sequence() -> None:
    pieces = [b"a", b"", b"\xff\x00", b"three"]
    tokens = TokenBytes(pieces)
    assert list(tokens) == pieces == tokens[:] == [tokens[i] for i in range(4)]
    assert tokens[1:3] == pieces[1:3]
    assert tokens == TokenBytes(pieces) != TokenBytes(pieces[:3])
    for index in (-1, 4):
        with pytest.raises(IndexError):
            tokens[index]


def test_decode_matches_the_library_on_any_ids(byte_level: tokenizers.Tokenizer, folder: Path) -> None:
    tokenizer, rng = load_tokenizer(folder), random.Random(1)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 12))
        assert tokenizer.decode(ids) == byte_level.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == byte_level.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode([tokenizer.vocab_size + 5, -1]) == ""


def test_eos_ids_come_from_every_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 10**9]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(folder).eos_token_ids == {1, 5, 6, 7}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a  1234 b", ["a", " ", " 1234", " b"]),
        ("smollm", "a  12 b", ["a", "  ", "1", "2", " b"]),
        ("llama-bpe", "x 12345\n\n  y's", ["x", " ", "123", "45", "\n\n", " ", " y", "'s"]),
        ("qwen2", "x 12345 Y'LL", ["x", " ", "1", "2", "3", "4", "5", " Y", "'LL"]),
        ("tekken", "fooBar 12/", ["foo", "Bar", " ", "1", "2", "/"]),
    ],
)
def test_pre_tokenizers(byte_level: tokenizers.Tokenizer, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = from_gguf(gguf_gpt2(byte_level) | {"tokenizer.ggml.pre": pre})
    splits = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in splits] == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_kinds_are_refused(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.pre is 'weird'"):
        from_gguf(gguf_gpt2(byte_level) | {"tokenizer.ggml.pre": "weird"})
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.model is 't5'"):
        from_gguf(gguf_gpt2(byte_level) | {"tokenizer.ggml.model": "t5"})
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="neither a GGUF file nor a folder"):
        load_tokenizer(tmp_path / "absent")


def test_text_that_is_no_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(FallowError, match="cannot be tokenized"):
        load_tokenizer(folder).encode("\ud800")


def test_a_tokenizer_of_another_model_is_found_out(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.check_vocabulary(tokenizer.vocab_size, "m")
    tokenizer.check_vocabulary(tokenizer.vocab_size + 64, "m")
    with pytest.raises(ModelFileError, match=rf"of m can give the token {tokenizer.vocab_size - 1} .* beside"):
        tokenizer.check_vocabulary(tokenizer.vocab_size - 1, "m")


@pytest.mark.parametrize(("ends", "fits"), [("</s>", True), ("<beyond>", False)])
def test_a_special_token_may_lie_beyond_the_model_if_no_text_needs_it(folder: Path, ends: str, fits: bool) -> None:
    size = load_tokenizer(folder).vocab_size
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<beyond>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": ends}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<beyond>", add_special_tokens=False) == [size]
    if fits:
        tokenizer.check_vocabulary(size, "m")
        return
    with pytest.raises(ModelFileError, match="'<beyond>'"):
        tokenizer.check_vocabulary(size, "m")


def test_no_chat_template_says_what_to_do(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FallowError, match="no chat template"):
        load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "hi"}])


def test_steps_that_would_blow_up_a_text_are_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [double] * 60}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelFileError, match="times longer"):
        load_tokenizer(folder)


def test_pattern_without_end_is_refused_at_use(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(FallowError, match="cannot be tokenized"):
        tokenizer.encode("a" * 60 + "b")


HOSTILE: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, "", "a", "\ud800", "x" * 5000, [], {}, [[]], [0]]
HOSTILE += [["a", "b", "c"], {"type": "BPE"}, {"type": "ByteLevel"}, {"Regex": "("}, {"String": ""}]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where to hit a JSON value; of long lists and objects a few entries stand for all."""
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        for key in list(value)[:12]:
            found += paths(value[key], (*prefix, key))
    elif isinstance(value, list):
        for i in sorted({*range(min(3, len(value))), len(value) - 1} - {-1}):
            found += paths(value[i], (*prefix, i))
    return found


def mutate(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        where = paths(value)
        if not where:
            break
        path = rng.choice(where)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.2:
            del parent[path[-1]]
        elif action < 0.3 and isinstance(parent, list):
            parent.extend([parent[path[-1]]] * 3)
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def works(load: Callable[[], Tokenizer]) -> bool:
    """Whether the tokenizer loads and is of use; where not, the only way to fail is a sentence."""
    try:
        tokenizer = load()
        use(tokenizer)
    except FallowError as error:
        message = str(error)
    else:
        return True
    assert message.endswith((".", "?"))
    return False


def use(tokenizer: Tokenizer) -> None:
    for text in ("the fox\n <s>\u00e9\u4e2d", ""):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert len(ids) < 1000
        tokenizer.decode(ids)


def small(document: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with fewer merges, so that some thousand of them load in seconds."""
    document = copy.deepcopy(document)
    document["model"]["merges"] = document["model"]["merges"][:40]
    return document


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_mutated_tokenizer_json(kind: str, byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    base = json.loads(byte_level.to_str()) if kind == "byte_level" else None
    document = small(base or json.loads(json.dumps(tokenizer_from_gguf(sentencepiece_metadata()).document)))
    document["post_processor"] = copy.deepcopy(BOS_BEFORE)
    rng, file, loaded = random.Random(7), tmp_path / "tokenizer.json", 0
    for i in range(1500):
        if i % 3:
            file.write_text(json.dumps(mutate(document, rng)))
        else:
            raw = bytearray(json.dumps(document).encode())
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(raw))
                raw[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            file.write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw)
        loaded += works(lambda: load_tokenizer(tmp_path))
    assert 50 < loaded < 1400  # the mutations are neither all harmless nor all fatal at once


def test_mutated_configs(folder: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "x"}],
        "eos_token_id": [1, 2],
    }
    rng = random.Random(8)
    files = ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"]
    for _ in range(400):
        text = json.dumps(mutate(config, rng))
        if rng.random() < 0.2:
            text = text[: rng.randrange(len(text))]
        (folder / rng.choice(files)).write_text(text)
        works(lambda: load_tokenizer(folder))
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match="damaged"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_mutated_gguf_metadata(kind: str, byte_level: tokenizers.Tokenizer) -> None:
    metadata = gguf_gpt2(byte_level) if kind == "gpt2" else sentencepiece_metadata()
    if kind == "gpt2":
        metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:40]
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ bos_token }}"}
    rng, loaded = random.Random(9), 0
    for _ in range(1000):
        mutated = mutate(metadata, rng)
        loaded += works(functools.partial(from_gguf, mutated))
    assert 50 < loaded < 950
