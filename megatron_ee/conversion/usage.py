"""Commands, printed after ``--exit``, that use the exported exit as a draft model for the original."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.manifest import MANIFEST

DRAFT_TOKENS = 4
"""Tokens drafted at a time. Each tool's own default for draft models is 3 to 5."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Every released model of these families with a tokenizer has one of these files."""

TEXT = """\
{output} is a plain {family} model of {layers} layers: use it by itself, or let it draft for
{original}, whose output stays the same.
{tokenizer}
{released}
transformers (Python):

{transformers}

vLLM (after 0.14):

{vllm}

SGLang:

{sglang}

llama.cpp (in its checkout):

{llama_cpp}
"""

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({original!r})
model = AutoModelForCausalLM.from_pretrained({original!r}, dtype="auto")
draft = AutoModelForCausalLM.from_pretrained({output!r}, dtype="auto")
prompt = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(
    prompt.input_ids,
    attention_mask=prompt.attention_mask,
    assistant_model=draft,
    do_sample=False,
    max_new_tokens=64,
)
print(tokenizer.decode(tokens[0]))"""


RELEASED = """
Not all of these tools read {original}; write it as a Hugging Face directory first:

{convert}
"""


def usage(output: Path, original: str, contents: Contents, config: Path | None = None) -> str:
    """Commands, ready to paste, for transformers, vLLM, SGLang and llama.cpp.

    Args:
        output: directory of the shallow model.
        original: directory of the original model, or its name on the Hugging Face hub.
        contents: the contents of ``output``; see ``shallow_model``.
        config: the Hugging Face directory of a Megatron checkpoint, if it was given.

    Returns:
        Several lines of text. Paths are absolute, so the commands run in any directory.
    """
    arch = contents.architecture
    assert arch is not None, "a shallow model has an architecture"
    draft = str(output.absolute())
    target = str(Path(original).absolute()) if Path(original).exists() else original
    released = ""
    if _unreadable(Path(target)):
        place = f"{draft}-original"
        convert = ["megatron-ee", "convert", "--input", target, "--output", place, "--to", "hf"]
        if Path(target).is_dir() and not (Path(target) / "config.json").is_file():
            convert += ["--trust-checkpoint", *(["--config", str(config.absolute())] if config is not None else [])]
        released = RELEASED.format(original=target, convert=shlex.join(convert))
        target = place
    if any(name in contents.assets for name in TOKENIZERS):
        tokenizer = "Both need the same tokenizer, so it was copied."
    else:
        tokenizer = (
            f"Both need the same tokenizer, but {contents.source} has none: copy {original}'s tokenizer files to "
            f"{output} before SGLang or llama.cpp read it."
        )
    return TEXT.format(
        output=output,
        original=original,
        family=arch.family,
        layers=arch.num_layers,
        tokenizer=tokenizer,
        released=released,
        transformers=TRANSFORMERS.format(original=target, output=draft),
        vllm=_vllm(draft, target),
        sglang=_sglang(draft, target),
        llama_cpp=_llama_cpp(draft, target),
    )


def _unreadable(original: Path) -> bool:
    """Whether it is local and in a format that not all of these tools read: GGUF, parallel or Megatron's."""
    return original.exists() and ((original / MANIFEST).is_file() or not (original / "config.json").is_file())


def _vllm(draft: str, target: str) -> str:
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": DRAFT_TOKENS}
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(speculative)])


def _sglang(draft: str, target: str) -> str:
    # One candidate per step (topk 1) is a plain chain. It is verified together with the token before it.
    model = ["sglang", "serve", "--model-path", target]
    algorithm = ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", draft]
    lengths = ["--speculative-num-steps", str(DRAFT_TOKENS), "--speculative-eagle-topk", "1"]
    return shlex.join([*model, *algorithm, *lengths, "--speculative-num-draft-tokens", str(DRAFT_TOKENS + 1)])


def _llama_cpp(draft: str, target: str) -> str:
    # A hub name is not a directory; with --remote, convert_hf_to_gguf.py downloads it.
    remote = [] if Path(target).exists() else ["--remote"]
    convert = ["python", "convert_hf_to_gguf.py"]
    serve = ["llama-server", "-m", "original.gguf", "-md", "draft.gguf"]
    return "\n".join(
        [
            shlex.join([*convert, *remote, target, "--outfile", "original.gguf"]),
            shlex.join([*convert, draft, "--outfile", "draft.gguf"]),
            # Without --spec-type the draft model is loaded, but not used.
            shlex.join([*serve, "--spec-type", "draft-simple", "--spec-draft-n-max", str(DRAFT_TOKENS)]),
        ]
    )
