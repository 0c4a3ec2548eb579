"""Multimodal releases: Gemma 3 from 4B on, Ministral 3. Only the text model is read.

Their ``config.json`` has the text model's configuration in ``text_config``. Their tensors have prefixes that depend on
the version of transformers that saved them (see ``conversion_mapping.py`` there).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.family import Family
from megatron_ee.families.gemma3 import GEMMA3
from megatron_ee.families.ministral3 import MINISTRAL3


@dataclass(frozen=True)
class Release:
    """One kind of multimodal release.

    Attributes:
        model_type: ``model_type`` in ``config.json``.
        architecture: the class in ``architectures``.
        text: family of the text model.
        text_model_type: ``model_type`` of a ``text_config`` that does not state it.
        defaults: defaults of ``text_config`` in transformers, for keys that every plain ``config.json`` has.
    """

    model_type: str
    architecture: str
    text: Family
    text_model_type: str
    defaults: Mapping[str, Any]


RELEASES: dict[str, Release] = {
    release.model_type: release
    for release in (
        Release(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            GEMMA3,
            "gemma3_text",
            {
                "vocab_size": 262_208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
            },
        ),
        Release(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            MINISTRAL3,
            "mistral",
            {
                "vocab_size": 131_072,
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "num_hidden_layers": 34,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
        ),
    )
}
"""By ``model_type``."""
_OF_THE_WHOLE = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "auto_map",
    "quantization_config",
    "compression_config",
)
"""Keys beside ``text_config`` that also apply to the text model. They take precedence over the same keys in it."""
VISION_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Small files that only vision needs."""


def find_release(config: Mapping[str, Any]) -> Release | None:
    """The kind of multimodal release of a ``config.json``; None for other models."""
    names, model_type = config.get("architectures"), config.get("model_type")
    for release in RELEASES.values():
        if names == [release.architecture] or (not names and model_type == release.model_type):
            return release
    return None


def plain_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Extract the text model's ``config.json``. A text model's ``config.json`` is returned unchanged.

    Args:
        config: the parsed file.
        where: name of the file, for messages.

    Raises:
        CheckpointError: ``text_config`` is not an object, or is for another model.
    """
    release = find_release(config)
    if release is None:
        return dict(config)
    if config.get("model_type") not in (None, release.model_type):
        raise CheckpointError(
            f"{where}: model_type {shown(config['model_type'])} contradicts architecture "
            f"{shown(release.architecture)}; correct one"
        )
    text = config.get("text_config")
    text = {} if text is None else text
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config must be an object, not {shown(text)}")
    model_type = text.get("model_type", release.text_model_type)
    if model_type != release.text.model_type:
        raise CheckpointError(
            f"{where}: text_config of model_type {shown(model_type)} is not supported in a {release.model_type} model, "
            f"only {release.text.model_type}"
        )
    whole = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {
        **release.defaults,
        **text,
        **whole,
        "architectures": [release.text.architecture],
        "model_type": release.text.model_type,
        "tie_word_embeddings": tied,
    }


@dataclass(frozen=True)
class Spelling:
    """The prefixes of a multimodal release's tensors.

    Attributes:
        body: replaces ``model.`` of a text model.
        head: replaces ``lm_head.``.
        vision: prefixes of tensors outside the text model.
    """

    body: str
    head: str
    vision: tuple[str, ...]

    def is_vision(self, name: str) -> bool:
        """Whether the tensor belongs to the vision tower or its projector."""
        return name.startswith(self.vision)

    def plain(self, name: str) -> str | None:
        """Convert a released name to the name in a text model; None for an unknown name."""
        for prefix, plain in ((self.body, "model."), (self.head, "lm_head.")):
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        return None

    def released(self, plain: str) -> str:
        """Convert a name in a text model to the released name."""
        if plain.startswith("lm_head."):
            return self.head + plain.removeprefix("lm_head.")
        return self.body + plain.removeprefix("model.")


SPELLINGS = (
    Spelling("language_model.model.", "language_model.lm_head.", ("vision_tower.", "multi_modal_projector.")),
    Spelling("model.language_model.", "lm_head.", ("model.vision_tower.", "model.multi_modal_projector.")),
)
"""The spellings of the files on the hub, and of the classes in transformers, which some versions save."""


def find_spelling(names: Collection[str], where: str) -> Spelling:
    """Find the spelling of a multimodal release's tensors.

    Raises:
        CheckpointError: no spelling, or more than one, matches.
    """
    found = [spelling for spelling in SPELLINGS if any(name.startswith(spelling.body) for name in names)]
    if len(found) != 1:
        prefixes = " or ".join(spelling.body for spelling in SPELLINGS)
        raise CheckpointError(
            f"{where}: config.json is a multimodal model's, so its text tensors must begin with {prefixes}, "
            f"{'not both' if found else 'but none does'}"
        )
    return found[0]
