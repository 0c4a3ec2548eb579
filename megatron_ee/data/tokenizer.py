"""Released tokenizers in any of their formats, from a model's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ee.data.token_length import count_characters
from megatron_ee.data.tokenizer_backends import Backend, SentencePieceBackend, Span, TokenizersBackend
from megatron_ee.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from megatron_ee.errors import DataError

_UNFINISHED = "\ufffd"  # decoders write it for bytes that are not a complete character
_LONGEST = 4  # the most bytes, and so tokens, of one character
_CONTEXT, _MOST_CONTEXT = 8, 64  # tokens decoded together with the next one: enough context for its first character

# Continuations are encoded after this text, so that the tokenizer adds no beginning-of-text space to them.
_JOINT = "\n"


class Tokenizer:
    """A tokenizer and where it came from.

    Attributes:
        path: the file or directory that it was loaded from.
        vocab_size: largest token id plus one, including added tokens. It may exceed the model's vocabulary.
        eos_id: end-of-text token, or None.
        bos_id: beginning-of-text token, or None.
        special: the special tokens, as the vocabulary spells them.
        special_tokens: the named special tokens (``bos_token``, ``eos_token`` and so on), for chat templates.
        templates: chat templates by name.
        model_vocab_size: rows of the model's embedding; None if there is no ``config.json`` beside the tokenizer.
    """

    def __init__(self, path: Path, backend: Backend, files: TokenizerFiles) -> None:
        self.path = path
        self.vocab_size = backend.vocab_size
        self.special = backend.special
        self.eos_id, self.bos_id = backend.eos_id, backend.bos_id
        if self.eos_id is None and files.eos_ids:
            self.eos_id = files.eos_ids[0]
        if self.bos_id is None and "bos_token" not in files.special:
            self.bos_id = files.bos_id
        self.templates: Mapping[str, str] = files.templates
        self.model_vocab_size = files.vocab_size
        self._backend = backend
        self._joint = backend.encode(_JOINT)
        named = {name: content for name, content in files.special.items() if content is not None}
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            content = None if token is None else backend.token_name(token)
            if name not in named and content is not None:
                named[name] = content
        self.special_tokens: Mapping[str, str] = named

    def encode(self, text: str) -> list[int]:
        """Token ids; no beginning-of-text or end-of-text token is added."""
        return self._backend.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds around a text, such as beginning-of-text."""
        return self._backend.encode_prompt(text)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text, found without tokenizing it; 0 if none is known."""
        longest = self._backend.longest_token
        return -(-count_characters(text) // longest) if longest else 0

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of a rendered chat template, and the characters of ``text`` that each token stands for."""
        return self._backend.encode_spans(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text after a line end, without the space that some tokenizers add before a text."""
        ids = self._backend.encode(_JOINT + text)
        size = len(self._joint)
        # If the line end is merged into the text's first token, the text is encoded alone.
        return ids[size:] if ids[:size] == self._joint else self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special tokens appear by name; ids that are no token (a padded vocabulary) add nothing."""
        return self._backend.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; concatenated, they equal ``decode(ids)``.

        A character that consists of several tokens appears with the last of them.
        """
        stream = Detokenizer(self)
        pieces = [stream.push(token) for token in ids]
        if pieces:
            pieces[-1] += stream.flush()
        return pieces

    def name_of(self, token: int) -> str | None:
        """A token as the vocabulary spells it; None if the id is no token."""
        return self._backend.token_name(token)

    def id_of(self, name: str) -> int | None:
        """The id of a token, given as the vocabulary spells it; None if there is no such token."""
        return self._backend.token_id(name)

    def unknown_token(self, ids: Sequence[int], model_vocab_size: int) -> str | None:
        """A message about the first id without an embedding in the model; None if there is no such id.

        A tokenizer may have more tokens than its model, such as a padding token that was added later. This is an error
        only if such a token occurs.
        """
        for token in ids:
            if token >= model_vocab_size:
                name = self.name_of(token)
                return f"token {name!r} (id {token}) is not in the model's vocabulary of {model_vocab_size} tokens"
        return None


class Detokenizer:
    """Decodes a sequence incrementally, at a constant cost per token.

    The returned texts, concatenated, are the part of ``decode(context + tokens)`` after ``decode(context)``. A
    character that consists of several tokens is returned with the last of them. If bytes are not valid text, some
    decoders change characters before them; text that was already returned is not changed.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """``context``: tokens before the first one, whose text is not returned."""
        self._decode, self._name_of = tokenizer.decode, tokenizer.name_of
        # The last tokens, and the number of characters of their text that were returned.
        self._ids, text = self._tail([token for token in context if self._name_of(token) is not None])
        self._given = len(text)
        self._waits = 0  # tokens since the last one that ended with a whole character
        self._limit = len(self._ids) + _CONTEXT

    def push(self, token: int) -> str:
        """The text that is final after ``token``; empty if the token does not complete a character."""
        if self._name_of(token) is None:  # padding ids of the vocabulary would push the context out of the window
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text.rstrip(_UNFINISHED))
        self._waits = self._waits + 1 if certain < len(text) else 0
        if self._waits >= _LONGEST:  # no character has this many bytes, so only the end may still become one
            certain = max(certain, len(text) - (_LONGEST - 1))
        certain = max(certain, self._given)
        new = text[self._given : certain]
        self._given = certain
        if len(self._ids) >= self._limit and (self._waits == 0 or len(self._ids) > _MOST_CONTEXT):
            held = len(text) - certain
            self._ids, text = self._tail(self._ids)
            self._given = max(len(text) - held, 0)
            self._limit = len(self._ids) + _CONTEXT
        return new

    def flush(self) -> str:
        """Return the rest of the text after the last token: an incomplete character, as the decoder shows it."""
        text = self._decode(self._ids)
        new = text[self._given :]
        self._given = len(text)
        return new

    def _tail(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The shortest tail of the tokens that decodes like the end of all tokens, and its text.

        A tail that begins inside a character is decoded differently, and spaces before a blank text may be lost.
        """
        for count in range(_CONTEXT, min(len(ids), _MOST_CONTEXT)):
            text = self._decode(ids[-count:])
            if text.strip() and not text.startswith(_UNFINISHED):
                return list(ids[-count:]), text
        last = list(ids[-_MOST_CONTEXT:])
        return last, self._decode(last)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, or a SentencePiece ``.model`` file alone.

    In a directory, ``tokenizer.json`` is used if it exists, else ``tokenizer.model``. Special tokens, added tokens and
    chat templates come from the files beside it. If neither exists, transformers converts the vocabulary of an older
    tokenizer. Code from the directory is never run.

    Raises:
        DataError: the path does not exist, holds no tokenizer, or the tokenizer cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; give a Hugging Face directory or a SentencePiece .model file")
    if path.is_file() and path.name != "tokenizer.json":
        return _of_sentencepiece(path, path, TokenizerFiles())
    directory = path.parent if path.is_file() else path
    files = read_tokenizer_files(directory)
    if (directory / "tokenizer.json").is_file():
        return _of_tokenizers(directory, files)
    if (directory / "tokenizer.model").is_file():
        return _of_sentencepiece(directory, directory / "tokenizer.model", files)
    if (directory / "tokenizer_config.json").is_file():
        return _of_transformers(directory, files)
    raise DataError(f"{path}: holds neither tokenizer.json, tokenizer_config.json nor tokenizer.model")


def _of_tokenizers(directory: Path, files: TokenizerFiles) -> Tokenizer:
    import tokenizers

    try:
        core = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        return Tokenizer(directory, TokenizersBackend(core, files, directory), files)
    except DataError:
        raise
    except Exception as error:  # the library also raises bare Exception
        raise _unusable(directory, error) from None


def _of_sentencepiece(path: Path, model: Path, files: TokenizerFiles) -> Tokenizer:
    try:
        return Tokenizer(path, SentencePieceBackend(model.read_bytes(), files), files)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{model}: not a SentencePiece model: {_one_line(error)}") from None


def _of_transformers(directory: Path, files: TokenizerFiles) -> Tokenizer:
    from transformers import AutoTokenizer  # noqa: TID251  trust_remote_code=False below

    try:
        # Given explicitly: otherwise transformers would ask on the terminal.
        hf = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        if not hf.is_fast:
            raise DataError(f"{directory}: this tokenizer cannot be converted to tokenizer.json; add that file")
        return Tokenizer(directory, TokenizersBackend(hf.backend_tokenizer, files, directory), files)
    except DataError:
        raise
    except Exception as error:  # the libraries may raise any exception on a damaged file, even a bare Exception
        raise _unusable(directory, error) from None


def _unusable(directory: Path, error: BaseException) -> DataError:
    return DataError(f"{directory}: the tokenizer cannot be loaded: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
