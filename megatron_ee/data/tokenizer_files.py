"""The files beside a released tokenizer: special and added tokens, chat templates, keys of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, DataError, shown
from megatron_ee.families.multimodal import plain_config

DEFAULT_TEMPLATE, TOOLS_TEMPLATE = "default", "tool_use"
"""Names of the chat templates for conversations without and with tools."""
_ID_DIGITS = 9  # of a token id at most, since corpora hold ids as int32


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in text before the tokenizer's model runs.

    Attributes:
        content: its text.
        id: None if no file states it; the token then gets the next free id.
        special: whether it is a named special token, or marked as special.
        lstrip: whether it includes white space before it.
        rstrip: whether it includes white space after it.
        single_word: whether it does not match inside a word.
        normalized: whether it is matched in the normalised text.
    """

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """Content of the files beside a tokenizer. The defaults are those of a bare ``tokenizer.model``.

    Attributes:
        settings: ``tokenizer_config.json``.
        special: content by name (``bos_token``, ``eos_token`` and so on); None if the file says null.
        added: tokens to match in text, those with an id first, in the order of their ids.
        templates: chat templates by name.
        eos_ids: ``eos_token_id`` of ``generation_config.json`` and ``config.json``, in this order.
        bos_id: ``bos_token_id`` of ``config.json``.
        vocab_size: rows of the model's embedding, from ``config.json``.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, str | None] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    vocab_size: int | None = None


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read ``tokenizer_config.json`` and its companion files, if they exist.

    As in transformers, ``special_tokens_map.json`` and ``added_tokens.json`` count only if the configuration has no
    ``added_tokens_decoder``: newer releases keep all tokens there.

    Raises:
        DataError: a file is damaged, or asks for code from the directory.
    """
    settings, config = read_object(directory / "tokenizer_config.json"), _model_config(directory)
    in_model = _asks_for_code(directory, settings, config)
    for name, has_code in (("tokenizer_config.json", settings.get("auto_map")), ("config.json", in_model)):
        if has_code:
            raise DataError(f"{directory / name}: auto_map asks for code from the checkpoint, which is never run")
    has_decoder = "added_tokens_decoder" in settings
    special_map = {} if has_decoder else read_object(directory / "special_tokens_map.json")
    named = _named_tokens({**settings, **special_map})
    extra = [
        token
        for source in (settings, special_map)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for token in _tokens_of(source.get(key))
    ]
    special = [token for token in named.values() if token is not None] + extra
    return TokenizerFiles(
        settings=settings,
        special={name: None if token is None else token.content for name, token in named.items()},
        added=_added_tokens(directory, settings, special),
        templates=_templates(directory, settings),
        eos_ids=eos_token_ids(directory),
        bos_id=_count_or_none(config.get("bos_token_id")),
        vocab_size=_count_or_none(config.get("vocab_size")),
    )


def _asks_for_code(directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether ``auto_map`` of ``config.json`` requires code that may tokenise differently from the files.

    An entry that only names another repository, such as ``Xenova/gpt-4o`` of Phi-4-mini, is ignored if there is a
    ``tokenizer.json`` and ``tokenizer_config.json`` names its class. transformers ignores it too.
    """
    auto_map = config.get("auto_map")
    wanted = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    repository = isinstance(wanted, str) and "/" in wanted and "--" not in wanted  # code elsewhere: owner/name--file.X
    named = isinstance(settings.get("tokenizer_class"), str) and settings["tokenizer_class"]
    return bool(wanted) and not (repository and named and (directory / "tokenizer.json").is_file())


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """All ``eos_token_id`` of ``generation_config.json`` and ``config.json``.

    Raises:
        DataError: a value is not a token id or a list of token ids.
    """
    found: list[int] = []
    generation = directory / "generation_config.json"
    for path, content in (
        (generation, read_object(generation)),
        (directory / "config.json", _model_config(directory)),
    ):
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise DataError(f"{path}: eos_token_id must be a token id or a list of them, not {shown(value)}")
        found += ids
    return tuple(dict.fromkeys(found))


def _model_config(directory: Path) -> dict[str, Any]:
    """``config.json``, or the text model's part of it for a multimodal release; empty if there is no file."""
    path = directory / "config.json"
    try:
        return plain_config(read_object(path), str(path))
    except CheckpointError as error:
        raise DataError(str(error)) from None


def _named_tokens(content: Mapping[str, Any]) -> dict[str, AddedToken | None]:
    """``bos_token``, ``eos_token`` and so on. A model's own special tokens may be in ``extra_special_tokens``."""
    extra = content.get("extra_special_tokens")
    content = {**content, **extra} if isinstance(extra, dict) else content
    named: dict[str, AddedToken | None] = {}
    for name, value in content.items():
        if name.endswith("_token") and value is None:
            named[name] = None
        elif name.endswith("_token") and (tokens := _tokens_of([value])):
            named[name] = tokens[0]
    return named


def _tokens_of(values: Any) -> list[AddedToken]:
    """Special tokens in a list of strings or of objects with ``content``. Other entries are ignored."""
    if not isinstance(values, list):
        return []
    contents = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [
        _added_token(content, value if isinstance(value, dict) else {}, special=True)
        for content, value in zip(contents, values, strict=True)
        if isinstance(content, str) and content
    ]


def _added_token(content: str, flags: Mapping[str, Any], *, special: bool, id: int | None = None) -> AddedToken:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    given = {name: bool(flags[name]) for name in names if name in flags}
    return AddedToken(content, id, special, **{"normalized": not special, **given})


def _added_tokens(directory: Path, settings: Mapping[str, Any], special: list[AddedToken]) -> tuple[AddedToken, ...]:
    """Every token that a file adds, each once."""
    special_contents = {token.content for token in special}
    entries: list[tuple[str, Any]]
    if "added_tokens_decoder" in settings:
        where, decoder = directory / "tokenizer_config.json", settings["added_tokens_decoder"]
        entries = list(decoder.items()) if isinstance(decoder, dict) else [("added_tokens_decoder", decoder)]
    else:
        where = directory / "added_tokens.json"
        entries = [(str(id_), {"content": content}) for content, id_ in read_object(where).items()]
    tokens: dict[str, AddedToken] = {}
    for key, entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not key.isdecimal() or len(key) > _ID_DIGITS:
            raise DataError(f"{where}: {shown(key)}: {shown(entry)} is not an added token with its id")
        is_special = bool(entry.get("special")) or content in special_contents
        tokens[content] = _added_token(content, entry, special=is_special, id=int(key))
    numbered = sorted(tokens.values(), key=lambda token: token.id or 0)
    unnumbered = {token.content: token for token in reversed(special) if token.content not in tokens}
    return (*numbered, *reversed(unnumbered.values()))


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. A template file takes precedence over the configuration's template of the same name."""
    value = settings.get("chat_template")
    if isinstance(value, str):
        value = {DEFAULT_TEMPLATE: value}
    elif isinstance(value, list):  # older transformers saved several templates in this form
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    templates = {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files[DEFAULT_TEMPLATE] = directory / "chat_template.jinja"
    return {**templates, **{name: read_template(path) for name, path in files.items()}}


def read_template(path: Path) -> str:
    """Read the chat template in a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: the chat template cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the chat template is not UTF-8") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no file.

    Raises:
        DataError: it cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def _count_or_none(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
