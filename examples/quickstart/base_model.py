"""Train the quickstart's base model: a SentencePiece tokenizer and a small Llama, saved as a Hugging Face checkpoint.

``python base_model.py --corpus DIR --out DIR --minutes 3.5`` reads ``DIR/train.jsonl`` and ``DIR/held_out.jsonl`` (see
corpus.py) and prints the model's directory on stdout: ``OUT/base-<hash of settings and corpus>``. If that directory
exists, it is reused. Needs only transformers, torch and sentencepiece.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

UNKNOWN, BEGIN, END = 0, 1, 2
REPORT_SECONDS = 15


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of the training, hashed into the directory's name together with the corpus.

    Attributes:
        minutes: training time. The learning rate depends on the elapsed share of this time, so a slow machine trains
            fewer steps but completes the schedule.
    """

    minutes: float = 3.5
    vocab_size: int = 4096
    layers: int = 8
    hidden_size: int = 256
    ffn_size: int = 704
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 1024
    sequence_length: int = 256
    batch_size: int = 8
    muon_rate: float = 1.0e-2
    adamw_rate: float = 5.0e-3
    warmup_share: float = 0.04
    weight_decay: float = 0.01
    seed: int = 1234


def read_texts(path: Path) -> list[str]:
    """The documents of a JSONL file as corpus.py writes it."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


# tokenizer


def pieces_of(text: str, size: int = 1000) -> Iterator[str]:
    """The text in pieces of at most ``size`` characters, line breaks included, since SentencePiece skips long
    sentences."""
    return (text[start : start + size] for start in range(0, len(text), size))


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model (the bytes of ``tokenizer.model``) that decodes every text exactly.

    Each digit is a piece, runs of spaces are pieces (indentation), line breaks are ordinary characters, and rare
    characters fall back to bytes. Ids 0, 1 and 2 are <unk>, <s> and </s>.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(piece for text in texts for piece in pieces_of(text)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        character_coverage=0.9995,
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        pad_id=-1,
        num_threads=max(os.cpu_count() or 1, 1),
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, directory: Path) -> None:
    """Write ``tokenizer.model`` and, through transformers, ``tokenizer.json`` and ``tokenizer_config.json``."""
    from transformers import LlamaTokenizer

    (directory / "tokenizer.model").write_bytes(model)
    tokenizer = LlamaTokenizer.from_pretrained(
        directory, add_prefix_space=False, add_bos_token=False, local_files_only=True
    )
    tokenizer.save_pretrained(directory)


# model


def build_model(settings: Settings, vocab_size: int) -> Any:
    """A randomly initialised ``LlamaForCausalLM``; each layer's two output projections start at zero, which speeds up
    training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_positions,
        bos_token_id=BEGIN,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def multiplies_bfloat16() -> bool:
    """Whether this machine has bfloat16 instructions. Without them products take twenty times as long as in float32."""
    import torch

    here = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_available() or bool(here)


@contextmanager
def exact_muon() -> Iterator[None]:
    """Make torch's Muon iterate in float32. By default it converts to bfloat16."""
    import torch

    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        yield


def token_loss(model: Any, windows: Any) -> Any:
    """Mean next-token loss in nats over windows [batch, sequence + 1] of token ids; bfloat16 products where fast."""
    import torch

    with torch.autocast(windows.device.type, torch.bfloat16, enabled=multiplies_bfloat16()):
        logits = model(windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def batches(stream: Any, settings: Settings) -> Iterator[Any]:
    """Endless windows [batch, sequence + 1] of the stream. Each epoch cuts it at other places and shuffles the
    windows."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    length = settings.sequence_length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        order = starts[torch.randperm(len(starts), generator=generator)]
        for rows in order.split(settings.batch_size):
            yield stream[rows[:, None] + torch.arange(length + 1)]


def rate_factor(share: float, warmup_share: float) -> float:
    """Learning rate as a share of its peak after ``share`` of the time: a linear rise, then a cosine to 0."""
    if share < warmup_share:
        return share / warmup_share
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup_share) / (1 - warmup_share))))


def make_optimizers(model: Any, settings: Settings) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the rest: embedding, head and norms.

    With so few tokens, AdamW alone would need several times as many.
    """
    import torch

    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(
            matrices, lr=settings.muon_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=settings.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: Any, stream: Any, settings: Settings) -> dict[str, float]:
    """Train ``model`` in place for ``settings.minutes``; returns steps, tokens and seconds."""
    import torch

    device = next(model.parameters()).device
    optimizers = make_optimizers(model, settings)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    model.train()
    steps = tokens = 0
    start = time.monotonic()
    with progress(settings.minutes * 60) as show:
        for windows in batches(stream, settings):
            elapsed = time.monotonic() - start
            share = elapsed / (settings.minutes * 60)
            if share >= 1:
                break
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate_factor(share, settings.warmup_share)
            loss = token_loss(model, windows.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with nullcontext() if multiplies_bfloat16() else exact_muon():
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            steps += 1
            tokens += windows[:, 1:].numel()
            show(elapsed, f"step {steps}, loss {loss.item():.2f}, {tokens / max(elapsed, 1e-9):,.0f} tokens/s")
    model.eval()
    return {"steps": steps, "tokens": tokens, "seconds": time.monotonic() - start}


def held_out_loss(model: Any, stream: Any, settings: Settings, limit: int = 200) -> float:
    """Mean loss over the first ``limit`` windows of the held-out stream."""
    import torch

    device = next(model.parameters()).device
    length = settings.sequence_length
    starts = torch.arange(0, len(stream) - length, length)[:limit]
    total = 0.0
    with torch.no_grad():
        for rows in starts.split(settings.batch_size):
            windows = stream[rows[:, None] + torch.arange(length + 1)].to(device)
            total += token_loss(model, windows).item() * len(rows)
    return total / len(starts)


# all of it


@contextmanager
def progress(seconds: float) -> Iterator[Any]:
    """A function of (elapsed seconds, text) that shows progress on stderr: a bar on a terminal, else occasional
    lines."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("base model", BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("base model", total=seconds, text="")
            yield lambda elapsed, text: bar.update(task, completed=elapsed, text=text)
    else:
        last = 0.0

        def show(elapsed: float, text: str) -> None:
            nonlocal last
            if elapsed - last >= REPORT_SECONDS:
                last = elapsed
                note(f"{elapsed:.0f} of {seconds:.0f} s: {text}")

        yield show


def note(text: str) -> None:
    """One line on stderr."""
    print(f"base model: {text}", file=sys.stderr, flush=True)


def directory_name(corpus: Path, settings: Settings) -> str:
    """``base-`` and a hash of the settings, this file and the corpus."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    for path in (Path(__file__), corpus / "train.jsonl", corpus / "held_out.jsonl"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"base-{digest.hexdigest()[:12]}"


def encode(texts: list[str], model: bytes) -> Any:
    """All documents as one stream of token ids, int64 [tokens], each ended by </s>."""
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    documents = processor.encode(texts, num_threads=max(os.cpu_count() or 1, 1))
    return torch.tensor([token for ids in documents for token in (*ids, END)], dtype=torch.int64)


def make(corpus: Path, directory: Path, settings: Settings) -> None:
    """Train everything in memory, write it to a temporary directory beside ``directory``, and rename that."""
    import sentencepiece
    import torch
    from transformers.utils.logging import disable_progress_bar

    texts, held_out_texts = read_texts(corpus / "train.jsonl"), read_texts(corpus / "held_out.jsonl")
    start = time.monotonic()
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    stream, held_out = encode(texts, tokenizer), encode(held_out_texts, tokenizer)
    for name, tokens in (("training", stream), ("held-out", held_out)):
        if len(tokens) <= 2 * settings.sequence_length:
            raise ValueError(f"the {name} text has only {len(tokens)} tokens; give more text")
    note(
        f"tokenizer of {vocab_size} pieces, {len(stream):,} training tokens, {len(held_out):,} held out "
        f"({time.monotonic() - start:.0f} s)"
    )
    model = build_model(settings, vocab_size).to("cuda" if torch.cuda.is_available() else "cpu")
    run = train(model, stream, settings)
    run["held_out_loss"] = held_out_loss(model, held_out, settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    note(
        f"{parameters / 1e6:.1f}M parameters, {run['steps']} steps, {run['tokens']:,} tokens, {run['seconds']:.0f} s, "
        f"held-out loss {run['held_out_loss']:.3f}"
    )
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
    try:
        temporary.chmod(0o755)
        disable_progress_bar()  # transformers' own, for the one file that is written here
        model.to(torch.bfloat16).save_pretrained(temporary)
        (temporary / "model.safetensors").chmod(0o644)
        save_tokenizer(tokenizer, temporary)
        (temporary / "quickstart.json").write_text(json.dumps({**dataclasses.asdict(settings), **run}, indent=2) + "\n")
        os.rename(temporary, directory)
    except OSError:
        if not directory.is_dir():  # if it exists now, another run has finished the same model first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="directory with train.jsonl and held_out.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="directory in which the model's directory is made")
    defaults = Settings()
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="time to train (default: %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes: must be a positive number, not {arguments.minutes}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        settings = dataclasses.replace(defaults, minutes=arguments.minutes)
        directory = arguments.out / directory_name(arguments.corpus, settings)
        if directory.is_dir():
            note(f"using {directory} of an earlier run")
        else:
            arguments.out.mkdir(parents=True, exist_ok=True)
            make(arguments.corpus, directory, settings)
    except (ValueError, OSError) as error:
        print(f"base_model.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        note("interrupted; nothing is kept")
        return 130
    print(directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
