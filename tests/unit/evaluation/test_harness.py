"""The model of lm-evaluation-harness against transformers and the harness's own class for Hugging Face models."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megatron_ee.commands.main import main
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.evaluation.harness import HarnessModel, _interleaved, close_loaded
from megatron_ee.inference.certificate import MADE_BY, VERSION
from megatron_ee.inference.released import open_released, released_digests
from megatron_ee.testing.models import save_tiny_model, sharpen, tiny_model
from megatron_ee.testing.ranks import run_ranks

TOLERANCE = 1e-4
LONG = "the quick brown fox jumps over a lazy dog while seven wizards write letters; " * 3
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green and wide"),
    ("The sky is", " b"),
    ("", "alone"),
    ("", "<s>begun"),
    ("<s>begun", " before"),
    ("ends with a space ", "word"),
    (LONG, " and so on"),
    ("a", LONG[:64]),  # as many tokens as the model reads
    (LONG, LONG[:63]),
]
TEXTS = ["short", "", "<s>begun", LONG[:63], LONG[:64], LONG[:65], LONG]
LIMITS = {"do_sample": False, "max_gen_toks": 12}
CONTEXTS = ["Once", "<s>begun", LONG, "Say it: ", "a"]
Scores = list[tuple[float, bool]]


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]


def answers(model: Any, **gen_kwargs: Any) -> list[str]:
    made = instances("generate_until", [(text, {**LIMITS, **gen_kwargs}) for text in CONTEXTS])
    found: list[str] = model.generate_until(made, disable_tqdm=True)
    return found


def likelihoods(model: Any) -> Scores:
    found: Scores = model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    return found


def rolling(model: Any) -> list[float]:
    found: list[float] = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True
    )
    return found


def check_equal(mine: Any, theirs: Any) -> None:
    """The same likelihoods, answers and greedy flags, whether one token or all count."""
    ours, others = likelihoods(mine), likelihoods(theirs)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in others], abs=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in others]
    assert rolling(mine) == pytest.approx(rolling(theirs), abs=TOLERANCE)
    assert answers(mine) == answers(theirs)


@pytest.fixture(scope="module")
def sharp_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[..., None]) -> Path:
    """As ``byte_model``, without beginning-of-text, with answers that do not repeat one token, and a chat template."""
    path = tmp_path_factory.mktemp("sharp")
    model = tiny_model("llama2", vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    sharpen(model)
    model.save_pretrained(path)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none here') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    save_tokenizer(path, bos=False, template=template)
    return path


def harness_model(path: Path, **model_args: Any) -> HarnessModel:
    return HarnessModel(pretrained=str(path), dtype="float32", batch_size=4, **model_args)


def own_class(path: Path, **model_args: Any) -> Any:
    """The harness's own class. In a batch it asks only the first text whether it begins with beginning-of-text."""
    return get_model("hf")(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, **model_args)


@pytest.mark.parametrize(("mode", "threshold"), [("threshold", 2.0), ("speculative", None)])
def test_modes_that_equal_full_mode_have_the_scores_of_transformers(
    mode: str, threshold: float | None, byte_model: Path, adapter: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = harness_model(byte_model, adapter=str(adapter), mode=mode, threshold=threshold)
    context, continuation = "The sky is", " blue"
    ids, count = tokenizer.encode(context + continuation), len(continuation)
    with torch.no_grad():
        scores = reference(torch.tensor([ids[:-1]])).logits[0, -count:].log_softmax(-1)
        ended = reference.generate(torch.tensor([tokenizer.encode(context)]), max_new_tokens=8, do_sample=False)
    expected = float(scores.gather(1, torch.tensor(ids[-count:])[:, None]).sum())
    greedy = scores.argmax(-1).tolist() == ids[-count:]
    with model:
        [(value, is_greedy)] = model.loglikelihood(instances("loglikelihood", [(context, continuation)]))
        [text] = model.generate_until(instances("generate_until", [(context, {"until": [], "max_gen_toks": 8})]))
        about = model.get_model_info()
    assert value == pytest.approx(expected, abs=TOLERANCE) and is_greedy is greedy
    assert text == tokenizer.decode(ended[0, len(ids) - count :], skip_special_tokens=True)
    assert about["model_setting"]["mode"] == mode and about["model_statistics"]["mean_exit_layer"] > 0


def test_contexts_take_turns_longest_first() -> None:
    a, b, c = (1, 2, 3), (4, 5), (6,)
    assert _interleaved([a, a, b, b, b, c], 2) == [0, 2, 1, 3, 4, 5]
    assert _interleaved([c, a], 1) == [1, 0] and _interleaved([], 4) == []


def test_the_entry_point_names_the_class() -> None:
    setup = (Path(__file__).resolve().parents[3] / "setup.py").read_text(encoding="utf-8")
    [(name, value)] = re.findall(r'"lm_eval\.models": \["(\w+) = ([\w.:]+)"\]', setup)
    assert importlib.metadata.EntryPoint(name, value, "lm_eval.models").load() is HarnessModel
    assert get_model(name) is HarnessModel


@pytest.mark.parametrize(
    ("model_args", "others", "message"),
    [
        ("pretrained=.,mod=full", [], "model_args: mod: unknown key; did you mean 'mode'?"),
        ("pretrained=nowhere", [], "model_args: pretrained: no such directory: nowhere; give one on this machine"),
        ("pretrained=.,adapter=nowhere", [], "model_args: adapter: no such directory: nowhere; give one on this machi"),
        (
            "pretrained=.,adapter=.,calibration=pyproject.toml",
            ["--cache_requests", "true", "--apply_chat_template"],
            "--cache_requests: does not record which requests went through the chat template",
        ),
        ("pretrained=.", ["--fewshot_as_multiturn", "true"], "When `fewshot_as_multiturn` is True, `apply_chat_templ"),
    ],
)
def test_arguments_of_the_command_are_refused_before_tasks_are_read(
    model_args: str,
    others: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: pytest.fail("tasks were read"))
    assert main(["harness", "--model_args", model_args, "--tasks", "some", *others]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"megatron-ee harness: error: {message}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte_model", "sharp_model"])
def test_full_mode_is_the_harness_own_class(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    with harness_model(path) as model:
        check_equal(model, own_class(path))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_do_not_change_scores(family: str, tmp_path: Path, save_tokenizer: Callable[..., None]) -> None:
    save_tiny_model(family, tmp_path, vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    save_tokenizer(tmp_path)
    with harness_model(tmp_path) as model:
        check_equal(model, own_class(tmp_path))


@pytest.mark.slow
def test_a_parallel_checkpoint_with_its_exits_is_a_model(byte_model: Path, adapter: Path, tmp_path: Path) -> None:
    command = ["convert", "--input", adapter, "--model", byte_model, "--to", "parallel", "--output", tmp_path / "all"]
    assert main([*map(str, command)]) == 0
    for given in ({"mode": "threshold", "threshold": 0.01}, {"exit": 2}):
        with harness_model(tmp_path / "all", **given) as mine:
            check_equal(mine, harness_model(byte_model, adapter=str(adapter), **given))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_the_beginning_of_text_is_that_of_the_harness_own_class(given: dict[str, Any], byte_model: Path) -> None:
    with harness_model(byte_model, **given) as model:
        check_equal(model, own_class(byte_model, **given))


@pytest.mark.slow
def test_a_shorter_context_cuts_as_the_harness_own_class(sharp_model: Path) -> None:
    with harness_model(sharp_model, max_length=40) as model:
        theirs = own_class(sharp_model, max_length=40)
        pairs = instances("loglikelihood", [pair for pair in PAIRS if len(pair[1]) <= 40])
        ours, others = model.loglikelihood(pairs), theirs.loglikelihood(pairs)
        assert [v for v, _ in ours] == pytest.approx([v for v, _ in others], abs=TOLERANCE)
        assert rolling(model) == pytest.approx(rolling(theirs), abs=TOLERANCE)
        assert answers(model) == answers(theirs)
        with pytest.raises(DataError, match="has 63 tokens of its own after its context; 1 to 40 can be scored"):
            model.loglikelihood(instances("loglikelihood", [("a", LONG[:63])]))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 2])
def test_an_exit_is_the_plain_model_that_convert_writes(
    layer: int, byte_model: Path, adapter: Path, tmp_path: Path
) -> None:
    command = ["convert", "--input", adapter, "--model", byte_model, "--to", "hf", "--exit", layer]
    assert main([*map(str, command), "--output", str(tmp_path / "exit")]) == 0
    with harness_model(byte_model, adapter=str(adapter), exit=layer) as model:
        check_equal(model, own_class(tmp_path / "exit"))


@pytest.mark.slow
def test_all_modes_that_equal_full_mode_do(byte_model: Path, adapter: Path) -> None:
    exits = {"adapter": str(adapter)}
    full = harness_model(byte_model, **exits, mode="full")
    never = harness_model(byte_model, **exits, threshold=1.5)
    speculative = harness_model(byte_model, **exits, mode="speculative", draft_length=3)
    low = harness_model(byte_model, **exits, threshold=0.01)
    check_equal(never, full)
    check_equal(speculative, full)
    drafted = speculative.get_model_info()["model_statistics"]
    assert drafted["proposed"] > 0
    assert answers(low) != answers(full)  # the exits are poor
    differences = [mine != other for (mine, _), (other, _) in zip(likelihoods(low), likelihoods(full), strict=True)]
    assert any(differences)
    assert low.get_model_info()["model_statistics"]["mean_exit_layer"] < 4
    assert HarnessModel._loaded is not None and HarnessModel._loaded() is full  # one at a time
    close_loaded()
    assert full._engine is None


@pytest.mark.slow
def test_stop_strings_end_answers(sharp_model: Path) -> None:
    theirs = own_class(sharp_model)
    with harness_model(sharp_model) as model:
        free = answers(model, until=[])
        stops = sorted({each for text in free for each in text[1:] if each.isascii() and each.isprintable()})
        assert stops
        for until in (stops[0], stops[:1], stops):
            ended = answers(model, until=until)
            assert ended == answers(theirs, until=until)
            assert ended != free
        assert model.get_model_info()["model_statistics"]["tokens"] < 12 * 4 * len(CONTEXTS)


@pytest.mark.slow
def test_thinking_is_cut_off_answers(sharp_model: Path) -> None:
    with harness_model(sharp_model) as model:
        free = answers(model, until=[])
    end = next(each for text in free for each in text[1:-1] if each.isascii() and each.isprintable())
    with harness_model(sharp_model, think_end_token=end) as model:
        cut = answers(model, until=[])
        assert cut == answers(own_class(sharp_model, think_end_token=end), until=[]) != free


@pytest.mark.slow
def test_sampled_answers_differ_and_are_repeated(sharp_model: Path) -> None:
    draws = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    requests = instances("generate_until", [("Once", draws)] * 3)
    with harness_model(sharp_model, seed=5) as model:
        first = model.generate_until(requests)
        assert len(set(first)) > 1 and model.generate_until(requests) == first
        assert model.generate_until(instances("generate_until", [("Once", {**draws, "temperature": 0.0})] * 2)) == (
            [model.generate_until(instances("generate_until", [("Once", {"max_gen_toks": 8})]))[0]] * 2
        )
    with harness_model(sharp_model, seed=6) as model:
        assert model.generate_until(requests) != first


@pytest.mark.slow
def test_generation_settings_that_cannot_be_followed_are_named(sharp_model: Path) -> None:
    model = harness_model(sharp_model)
    for given, message in [
        ({"num_beams": 4}, "gen_kwargs: num_beams: cannot be used with megatron_ee; possible: until, max_gen_toks, "),
        ({"max_gen_toks": 64}, "gen_kwargs: max_gen_toks: must be at least 1 and below the model's 64 positions, not"),
        ({"top_p": 2.0, "do_sample": True}, "gen_kwargs: top_p: must be at most 1, not 2.0"),
    ]:
        with pytest.raises(ConfigError) as raised:
            answers(model, **given)
        assert str(raised.value).startswith(message)
    with pytest.raises(ConfigError, match="model_args: max_length: 65 is more than the model's 64 positions"):
        harness_model(sharp_model, max_length=65)
    with pytest.raises(ConfigError, match="model_args: enable_thinking: has no effect on likelihoods"):
        likelihoods(harness_model(sharp_model, enable_thinking=True, think_end_token="]"))


def test_a_certificate_is_the_policy_of_the_requests_that_it_covers(
    byte_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    decoding = {"chat": False, "max_tokens": 8, "stop": ["\n"], "sampling": {}, "dtype": "float32"}
    certificate = {
        **{"made_by": MADE_BY, "version": VERSION, "task": "words", "loss": "rouge", "p_value": "betting"},
        **{"risk": 0.05, "delta": 0.1, "n": 80, "n_fit": 20, "full_layers": 4, "overlap": "none", "seed": 0},
        **released_digests(open_released(byte_model, adapter)),
        **{"policy": {"name": "threshold", "threshold": 2.0, "thresholds": {"1": 0.01}}, "data_sha256": "0" * 64},
        **{"decoding": {**decoding, "weights": "packed", "quantise": "none"}, "date": "2026-01-01T00:00:00+00:00"},
    }
    path.write_text(json.dumps(certificate))
    covered, other = {"until": ["\n"], "max_gen_toks": 8}, {"until": ["\n"], "max_gen_toks": 9}

    def run(**model_args: Any) -> tuple[list[str], Scores, dict[str, Any]]:
        with harness_model(byte_model, adapter=str(adapter), **model_args) as model:
            asked = instances("generate_until", [("The sky is", covered), ("The sky is", other)])
            texts = model.generate_until(asked, disable_tqdm=True)
            scores = model.loglikelihood(instances("loglikelihood", PAIRS[:2]), disable_tqdm=True)
            return texts, scores, model.get_model_info()

    early, full = run(threshold=2.0, thresholds={1: 0.01}, exits=1), run(mode="full")
    assert early[0][0] != full[0][0] and early[1] != full[1]
    capsys.readouterr()
    texts, scores, about = run(calibration=str(path))
    assert texts == [early[0][0], full[0][1]]
    assert scores == full[1]
    assert about["model_calibration"]["requests"] == {"certified": 1, "full": 1 + 2}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model_args: ")]
    assert told[0].endswith("1 of 2 requests run in full mode: max_tokens: 9, but it was calibrated with 8")
    assert "2 of 2 requests run in full mode: forced_ids: " in told[1] and len(told) == 2
    texts, scores, about = run(calibration=str(path), uncertified=True)
    assert texts == early[0] and scores == early[1]
    assert about["model_calibration"]["requests"] == {"certified": 1, "uncertified": 1 + 2}


@pytest.mark.slow
def test_conversations_are_rendered_as_by_the_harness_own_class(sharp_model: Path, byte_model: Path) -> None:
    model, theirs = harness_model(sharp_model), own_class(sharp_model)
    plain = [{"role": "user", "content": "Hi"}]
    begun = [*plain, {"role": "assistant", "content": "Well"}]
    for messages, prompt in ((plain, True), (begun, False), ([{"role": "system", "content": "s"}, *plain], True)):
        text = model.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
    assert text == "[user]Hi</s>[assistant]" and hash(text) in model._chats
    assert model.tokenizer_name == theirs.tokenizer_name
    assert model.chat_template(True) == theirs.chat_template(True)
    with pytest.raises(DataError, match="the tokenizer has no chat template; leave out --apply_chat_template"):
        harness_model(byte_model).apply_chat_template(plain)


def on_rank(path: str, adapter: str, tensor: int, pipeline: int) -> tuple[Scores, list[str]] | None:
    """On one rank: what a threshold gives; None on a rank that worked for the first one and was then ended."""
    try:
        with harness_model(Path(path), adapter=adapter, threshold=0.01, tensor=tensor, pipeline=pipeline) as model:
            return likelihoods(model), answers(model)
    except SystemExit as end:
        assert end.code == 0
        return None


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_several_processes_give_what_one_gives(tensor: int, pipeline: int, byte_model: Path, adapter: Path) -> None:
    given = (str(byte_model), str(adapter))
    one = on_rank(*given, 1, 1)
    first, second = run_ranks(2, on_rank, *given, tensor, pipeline)
    assert second is None and one is not None
    assert [value for value, _ in first[0]] == pytest.approx([value for value, _ in one[0]], abs=TOLERANCE)
    assert first[1] == one[1]


@pytest.fixture
def tasks(tmp_path: Path, sharp_model: Path) -> list[str]:
    """Three local tasks, as files of the harness."""
    with harness_model(sharp_model) as model:
        said = model.generate_until(
            instances("generate_until", [(q, {"until": ["\n"], "max_gen_toks": 8}) for q in ("Why?", "How?")])
        )
    documents = {
        "choose": [
            {"question": "The sky is", "choices": ["blue", "green as grass", "low"], "answer": 0},
            {"question": "Grass is", "choices": ["blue", "green"], "answer": 1},
            {"question": LONG, "choices": ["so", "not so"], "answer": 1},
        ],
        "answer": [{"question": q, "answer": a} for q, a in zip(["Why?", "How?"], [said[0], "no"], strict=True)],
        "perplexity": [{"text": LONG}, {"text": "short text"}],
    }
    kinds: dict[str, Any] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
    }
    paths = []
    for name, kind in kinds.items():
        data, path = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.yaml"
        data.write_text("".join(json.dumps(each) + "\n" for each in documents[name]))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **kind}
        path.write_text(json.dumps(task))  # JSON is YAML
        paths.append(str(path))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_tasks_have_the_scores_of_the_harness_own_class(chat: bool, sharp_model: Path, tasks: list[str]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = {}
    for name, given in {"megatron_ee": {"max_batch_size": 3}, "hf": {"device": "cpu"}}.items():
        found[name] = lm_eval.simple_evaluate(
            model=name,
            model_args={"pretrained": str(sharp_model), "dtype": "float32"},
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            apply_chat_template=chat,
            batch_size=2,
            **given,
        )
        gc.collect()  # frees the model, which is in reference cycles
    mine, theirs = found["megatron_ee"], found["hf"]
    assert mine["results"].keys() == {"choose", "answer", "perplexity"}
    for task, scores in theirs["results"].items():
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert numbers
        assert {key: mine["results"][task][key] for key in numbers} == pytest.approx(numbers, rel=TOLERANCE)
        for ours, others in zip(mine["samples"][task], theirs["samples"][task], strict=True):
            assert ours["arguments"] == others["arguments"]
            for one, other in zip(ours["filtered_resps"], others["filtered_resps"], strict=True):
                assert one == (other if isinstance(other, str) else pytest.approx(other, abs=TOLERANCE))
    if not chat:
        assert mine["results"]["answer"]["exact_match,none"] == 0.5
    assert mine["config"]["model_setting"]["mode"] == "full"
    assert mine["config"]["model_statistics"]["outputs"] > 0


@pytest.mark.slow
def test_the_command_line_of_the_harness(
    byte_model: Path,
    adapter: Path,
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    given = f"pretrained={byte_model},adapter={adapter},mode=threshold,threshold=0.8"
    line = ["harness", "--model_args", given, "--tasks", ",".join(tasks), "--output_path", str(tmp_path / "out")]
    assert main([*line, "--batch_size", "auto"]) == 0
    assert "megatron_ee ({'pretrained': " in (out := capsys.readouterr().out) and "exact_match" in out
    [written] = (tmp_path / "out").rglob("results_*.json")
    setting = json.loads(written.read_text())["config"]["model_setting"]
    assert setting["policy"]["threshold"] == 0.8
