"""The model ``megatron_ee`` of lm-evaluation-harness: its tasks in any mode, or at one exit, through the engine.

Importing this module registers the model. Texts become tokens, and contexts that are too long are cut, as the harness's
own class for Hugging Face models does it. So full mode has the scores of that class.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, DataError, UserError, shown
from megatron_ee.evaluation.harness_settings import WHERE, HarnessArguments
from megatron_ee.evaluation.tasks.choices import forced_request, log_likelihood
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.offline import run_batch
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.progress import track

NAME = "megatron_ee"
"""Name of the model in the harness."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys of a task's ``generation_kwargs`` that choose tokens."""
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of a context and its continuation (None for a part of a longer text), and the token ids of both."""


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A model with exits, for ``lm_eval.simple_evaluate`` and the command line of the harness.

    The weights are loaded for the first request, and stay until ``close``. One model is loaded at a time: another one
    closes it, and it is loaded again when it is needed again.

    Attributes:
        arguments: the model's arguments.
        tokenizer: the tokenizer as transformers reads it, as the harness's own class does.
    """

    backend = "causal"
    _loaded: weakref.ref[HarnessModel] | None = None

    def __init__(self, **model_args: Any) -> None:
        """Open and check the model, without loading it. ``model_args`` are those of ``HarnessArguments``.

        Raises:
            UserError: an argument, the model, the exits or the tokenizer is invalid.
        """
        super().__init__()
        try:
            self._prepare(validated(HarnessArguments, model_args, where=WHERE))
        except UserError as error:
            error.common = True  # every rank has the same arguments
            raise
        self._engine: Engine | None = None
        self._close: Callable[[], object] = lambda: None
        self._statistics: dict[str, object] = {}
        self._covered: Counter[str] = Counter()
        self._chats: set[int] = set()  # hashes of the texts that the chat template made

    def _prepare(self, arguments: HarnessArguments) -> None:
        self.arguments = arguments
        self._released = arguments.open()
        self._setting = arguments.setting(self._released)
        self._calibration = arguments.certificate(self._released)
        self._options = arguments.options(self._released, self._setting, self._calibration)
        most = self._released.model.architecture.max_generated_positions
        self.max_length = arguments.max_length or most
        if self.max_length > most:
            raise ConfigError(f"{WHERE}: max_length: {self.max_length} is more than the model's {most} positions")
        self.tokenizer = _load_tokenizer(arguments)
        self._prefix = self._choose_prefix()

    @property
    def engine(self) -> Engine:
        """The engine, loaded if it is not.

        Raises:
            SystemExit: on all ranks but the first, which has no more work for them.
        """
        if self._engine is None:
            close_loaded()
            stack = contextlib.ExitStack()
            engine = stack.enter_context(open_engine(self._released, self._options))
            if engine is None:
                stack.close()
                raise SystemExit(0)
            self._engine = engine
            self._close = weakref.finalize(self, stack.close)  # at the latest when Python ends
            HarnessModel._loaded = weakref.ref(self)
        return self._engine

    def close(self) -> None:
        """Free the model's memory, and end the other ranks. It is loaded again for the next request."""
        if self._engine is not None:
            self._statistics = self._engine.statistics()
            self._engine = None
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int | None:
        """End of text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: beginning of text, else end of text, unless an argument says it."""
        return self._prefix

    def _choose_prefix(self) -> int:
        for token in (self.arguments.prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(f"{WHERE}: prefix_token_id: the tokenizer has no beginning or end of text; give a token id")

    @property
    def max_gen_toks(self) -> int:
        """Largest number of tokens of an answer, unless a task says it."""
        return self.arguments.max_gen_toks

    @property
    def batch_size(self) -> int:
        """Largest number of sequences that run together."""
        return self.arguments.num_seqs

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. Special tokens are added as the tokenizer does by default, unless the text begins with one."""
        adds = self.arguments.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            adds = False
        return self._encode(string, adds)

    def _encode(self, text: str, adds: bool | None) -> list[int]:
        return list(self.tokenizer.encode(text, **({} if adds is None else {"add_special_tokens": adds})))

    def _context(self, text: str) -> list[int]:
        """Token ids of a text that the model continues."""
        adds = self.arguments.add_bos_token
        return self._encode(text, False if has_bos_prefix(text, self.tokenizer.bos_token) else adds)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's caches of requests."""
        return str(self._released.path.absolute()).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation, without its system message if the template refuses that.

        Raises:
            DataError: there is no template, or it fails on these messages.
        """
        where = f"{self._released.path}: "
        if self.tokenizer.chat_template is None:
            raise DataError(f"{where}the tokenizer has no chat template; leave out --apply_chat_template")
        try:
            try:
                text = self._rendered(chat_history, add_generation_prompt)
            except jinja2.TemplateError:
                others = [message for message in chat_history if message["role"] != "system"]
                text = self._rendered(others, add_generation_prompt)
        except Exception as error:  # a template is a program and may raise any exception
            raise DataError(f"{where}the chat template fails on these messages: {error}") from None
        self._chats.add(hash(text))
        return text

    def _rendered(self, messages: list[dict[str, str]], prompt: bool) -> str:
        thinking = self.arguments.enable_thinking
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=not prompt,
                **({} if thinking is None else {"enable_thinking": thinking}),
            )
        )

    # ----------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each context and continuation the log-likelihood, and whether every token is the most probable one."""
        if self.arguments.enable_thinking:
            raise ConfigError(f"{WHERE}: enable_thinking: has no effect on likelihoods; choose tasks that generate")
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of ``max_length`` tokens, each token once."""
        windows: list[Scored] = []
        counts = []
        for request in requests:
            parts = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            found: list[Scored] = [(None, *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum((next(scores)[0] for _ in range(count)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        order = _interleaved([tuple(context) for _, context, _ in requests], self.batch_size)
        forced = [self._forced(*requests[place]) for place in order]
        scores: dict[int, tuple[float, bool]] = {}
        for number, completion in self._run(forced, "scoring", enabled=not disable_tqdm):
            place, ids = order[number], forced[number].forced_ids
            greedy = tuple(token.id for token in completion.tokens) == ids
            scores[place] = log_likelihood(completion), greedy
            texts = requests[place][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[place])
        return [scores[place] for place in range(len(requests))]

    def _forced(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Request:
        """A request that scores a continuation. What the model cannot read is cut off the start of the context."""
        if not continuation or len(continuation) > self.max_length:
            what = "a text" if texts is None else shown(texts[1])
            limit = f"1 to {self.max_length} can be scored"
            raise DataError(f"{what} has {len(continuation)} tokens of its own after its context; {limit}")
        # The last token is scored, not read.
        before = context[-(self.max_length + 1 - len(continuation)) :]
        return self._certified(forced_request(self._setting, tuple(before), tuple(continuation)), chat=False)

    # ------------------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of its stop strings.

        Raises:
            ConfigError: a task's ``generation_kwargs`` cannot be followed; the message names the key.
        """
        made = [self._generated(number, *request.args) for number, request in enumerate(requests)]
        order = sorted(range(len(made)), key=lambda place: -len(made[place][0].prompt))
        answers: dict[int, str] = {}
        for number, completion in self._run([made[place][0] for place in order], "answering", enabled=not disable_tqdm):
            place = order[number]
            text = self.tokenizer.decode([token.id for token in completion.tokens], skip_special_tokens=True)
            answers[place] = postprocess_generated_text(text, made[place][1], self.arguments.think_end_token)
            self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
        return [answers[place] for place in range(len(made))]

    def _generated(self, number: int, context: str, gen_kwargs: Mapping[str, Any]) -> tuple[Request, list[str]]:
        """The request for one answer, and its stop strings. Sampled answers have seeds that differ."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        stop = [text for text in handle_stop_sequences(kwargs.pop("until"), eos=end) if text]
        tokens, draws = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        sampling = {key: kwargs.pop(key) for key in SAMPLING if kwargs.get(key) is not None}
        if not draws:
            sampling["temperature"] = 0.0
        for key, value in kwargs.items():
            if value is not None and (key, value) not in (("num_beams", 1), ("num_return_sequences", 1)):
                possible = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
                raise ConfigError(f"gen_kwargs: {key}: cannot be used with {NAME}; possible: {possible}")
        room = self.max_length - tokens
        if tokens < 1 or room < 1:
            raise ConfigError(
                f"gen_kwargs: max_gen_toks: must be at least 1 and below the model's {self.max_length} positions, not "
                f"{tokens}; give it with --gen_kwargs"
            )
        prompt = tuple(self._context(context)[-room:]) or (self.prefix_token_id,)
        seeded = {**sampling, "seed": self.arguments.seed + number}
        request = self._setting.request(
            prompt,
            draft=self.arguments.draft,
            sampling=validated(Sampling, seeded, where="gen_kwargs"),
            max_tokens=tokens,
            stop=tuple(text for text in stop if text != end),  # its token ends an answer
        )
        return self._certified(request, chat=hash(context) in self._chats), stop

    # ------------------------------------------------------------------------------------------------------ certificate

    def _certified(self, request: Request, *, chat: bool) -> Request:
        """The request under the certificate, if there is one."""
        if self._calibration is None:
            return request
        group, uncertified = self.arguments.calibration_group, self.arguments.uncertified
        return self._calibration.apply(request, chat=chat, group=group, uncertified=uncertified)

    def _say_coverage(self, requests: Sequence[Request]) -> None:
        """Count what the certificate covers, and say on stderr what it does not: a line per setting that differs."""
        others: dict[tuple[str, str], list[str]] = {}
        for coverage in filter(None, (request.coverage for request in requests)):
            self._covered[coverage.status] += 1
            reason = coverage.reason or ""
            if coverage.status != "certified":
                others.setdefault((coverage.status, reason.partition(":")[0]), []).append(reason)
        for (status, _), reasons in others.items():
            ran = "run in full mode" if status == "full" else "are not certified"
            counts = f"{len(reasons)} of {len(requests)} requests {ran}"
            print(f"{WHERE}: calibration: {counts}: {reasons[0]}", file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------------------------- engine

    def _run(self, requests: Sequence[Request], what: str, *, enabled: bool) -> Iterator[tuple[int, Completion]]:
        """The completion of each request, as it ends, with the request's index."""
        if not requests:
            return
        engine = self.engine
        self._say_coverage(requests)
        with track(len(requests), "requests", what, "tokens", enabled=enabled) as bar:
            for number, [outcome] in run_batch(engine, requests, ahead=2 * self.batch_size):
                if isinstance(outcome, str):
                    raise UserError(f"{self._released.path}: {outcome}")
                bar.advance(1, len(outcome.tokens))
                yield number, outcome

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to its results: how the model answered, and how many layers that took."""
        adapter, engine, calibration = self._released.adapter, self._engine, self._calibration
        certificate = None if calibration is None else {"path": str(calibration.path), "sha256": calibration.sha256}
        return {
            "model_setting": replace(self._setting, stop=()).to_dict(),
            "model_exit": self.arguments.exit,
            "model_calibration": None if certificate is None else {**certificate, "requests": dict(self._covered)},
            "model_adapter": None if adapter is None else str(adapter.path),
            "model_statistics": self._statistics if engine is None else engine.statistics(),
        }


def close_loaded() -> None:
    """Close the model that is loaded, if there is one."""
    model = None if HarnessModel._loaded is None else HarnessModel._loaded()
    if model is not None:
        model.close()


def _load_tokenizer(arguments: HarnessArguments) -> Any:
    from transformers import AutoTokenizer  # noqa: TID251  trust_remote_code=False below

    adds = arguments.add_bos_token
    try:
        return AutoTokenizer.from_pretrained(
            arguments.pretrained,
            trust_remote_code=False,
            local_files_only=True,
            **({} if adds is None else {"add_bos_token": adds}),
        )
    except Exception as error:  # the libraries may raise any exception on a damaged file
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{arguments.pretrained}: the tokenizer cannot be loaded: {reason}") from None


def _interleaved(contexts: Sequence[tuple[int, ...]], width: int) -> list[int]:
    """An order of requests in which those of one context do not run together, so that the later ones copy its KV.

    Long contexts come first. ``width`` contexts take turns.

    Args:
        contexts: of each request.
        width: number of sequences that run together.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, context in enumerate(contexts):
        places.setdefault(context, []).append(place)
    groups = sorted(places.values(), key=lambda own: -len(contexts[own[0]]))
    order = []
    for start in range(0, len(groups), width):
        block = groups[start : start + width]
        for turn in range(max(map(len, block))):
            order += [own[turn] for own in block if turn < len(own)]
    return order
