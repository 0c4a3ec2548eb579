"""``megatron-ee prepare-data``: text or chat jsonl to an indexed corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ee.commands import Parser, at_least
from megatron_ee.errors import ConfigError

DESCRIPTION = """Tokenize text into an indexed corpus (PREFIX.bin, PREFIX.idx, PREFIX.json) for tune and evaluate.
A text file is one document. Each line of a jsonl file is one document."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("prepare-data", DESCRIPTION)
    result.add_argument(
        "--input", type=Path, required=True, nargs="+", metavar="FILE", help="text or jsonl files to read"
    )
    result.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="the model's Hugging Face directory, or a SentencePiece .model file",
    )
    result.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="path of the corpus, without suffix"
    )
    result.add_argument("--text-key", metavar="KEY", help="jsonl key of the text (default: text)")
    result.add_argument(
        "--chat",
        action="store_true",
        help='read jsonl lines of {"messages": [...]} with the chat template; train only the assistant\'s tokens',
    )
    result.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="with --chat: a jinja file that replaces the model's chat template",
    )
    result.add_argument(
        "--prepend-bos", action="store_true", help="begin each document with the beginning-of-text token"
    )
    result.add_argument(
        "--workers", type=at_least(1), metavar="N", help="processes (default: one per core; one for small inputs)"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing corpus that prepare-data wrote")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Write the corpus and print its size."""
    if arguments.chat and (arguments.text_key is not None or arguments.prepend_bos):
        option = "--prepend-bos" if arguments.prepend_bos else "--text-key"
        raise ConfigError(f"{option}: cannot be used with --chat, where the chat template decides; leave it out")
    if arguments.chat_template is not None and not arguments.chat:
        raise ConfigError("--chat-template: applies to chat data only; give --chat, too")
    from megatron_ee.commands.inputs import check_input

    check_input("--input", *arguments.input)
    check_input("--tokenizer", arguments.tokenizer)
    check_input("--chat-template", arguments.chat_template)
    from megatron_ee.data.prepare import prepare_corpus

    result = prepare_corpus(
        inputs=arguments.input,
        tokenizer_path=arguments.tokenizer,
        output_prefix=arguments.output,
        text_key=arguments.text_key or "text",
        chat=arguments.chat,
        workers=arguments.workers,
        prepend_bos=arguments.prepend_bos,
        overwrite=arguments.overwrite,
        chat_template=arguments.chat_template,
    )
    skipped = f", {result.skipped} empty lines skipped" if result.skipped else ""
    print(f"{arguments.output}: {result.metadata.documents} documents, {result.metadata.tokens} tokens{skipped}")
    return 0
