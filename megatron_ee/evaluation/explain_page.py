"""The HTML page that explains answers: for people who want to see where an early answer comes from.

One file without scripts. Tokens of the answer link to their row of the table below it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.evaluation.explain import ExitShare, ExplainedToken, Explanation, Prediction
from megatron_ee.evaluation.tinted import DEEPEST, TINTED_STYLE, escaped, html_page, marked_spaces, tinted_answer, tints

_LIGHT = "--paper:#fff;--ink:#1d1d1f;--soft:#5c6066;--line:#d8dade;--card:#f6f7f9;--bar:#3367d6;--good:#1a7f37"
_DARK = "--paper:#16181c;--ink:#e8e8ea;--soft:#a0a5ad;--line:#3b3f46;--card:#20242a;--bar:#8ab4f8;--good:#7ee29a"
_STYLE = "".join(
    [
        TINTED_STYLE,
        f":root{{{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}",
        "*{box-sizing:border-box}",
        "body{font:1rem/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:80rem;",
        "margin:0 auto;padding:1.5rem clamp(.75rem,3vw,2rem) 4rem}",
        "h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2.5rem 0 .75rem;padding-top:1rem;",
        "border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.5rem 0 .4rem}",
        "p{margin:.4rem 0;max-width:60rem}.lead,.note,small{color:var(--soft)}.note{font-size:.9rem}",
        "pre{font:.95rem/1.75 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}",
        ".card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;",
        "margin:.75rem 0;min-width:0}.card h3{margin:0 0 .4rem}",
        ".pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 1rem}",
        ".prompt{max-height:14rem;overflow:auto}.prompt pre{color:var(--soft)}",
        ".verdict{font-size:1.05rem;border-left:.3rem solid var(--good);padding:.1rem .75rem;margin:1rem 0}",
        ".verdict.other{border-color:var(--mark)}",
        "a.token{border-radius:.2rem}a.token:hover,a.token:focus-visible{outline:2px solid var(--bar)}",
        ".scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;width:fit-content;max-width:100%}",
        "table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}",
        "th,td{padding:.35rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}",
        "thead th{background:var(--card);vertical-align:bottom}thead small{display:block;font-weight:400}",
        "tr:last-child>*{border-bottom:0}td.number{text-align:right}small{font-size:.9em}",
        "td small,th small{display:block}",
        ".shares td small{display:inline;margin-left:.35em}",
        ".tokens tbody th{position:sticky;left:0;background:var(--paper);font-weight:400;z-index:1;min-width:6.5rem}",
        ".tokens thead th:first-child{position:sticky;left:0;z-index:2}",
        ".tokens tr>th:first-child{box-shadow:1px 0 var(--line)}",
        ".said{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}",
        "td.exit{min-width:7.5rem;max-width:14rem;background-image:linear-gradient(var(--bar),var(--bar));",
        "background-repeat:no-repeat;background-position:0 100%;background-size:var(--p,0%) 3px}",
        "td.agrees .said{color:var(--soft)}td.says .said{font-weight:600}",
        "td.emitted{box-shadow:inset 0 0 0 2px var(--ink)}td.emitted .said{color:inherit}",
        "td.later{opacity:.75}",
        ".chip{display:inline-block;border-radius:.25rem;padding:0 .4rem;white-space:nowrap}",
        f".chip.{DEEPEST}{{outline:1px solid var(--line)}}",
        "tr.part>*{border-top:2px solid var(--mark)}tr.part small.mark{color:var(--mark)}",
        "tr:target>*{outline:2px solid var(--bar);outline-offset:-2px}",
        ".key{display:flex;flex-wrap:wrap;gap:.3rem 1.25rem;list-style:none;padding:0;margin:.5rem 0}",
        "td,th,.chip{print-color-adjust:exact;-webkit-print-color-adjust:exact}",
        f"@media print{{:root{{{_LIGHT};font-size:12px}}body{{max-width:none;padding:0}}",
        ".prompt{max-height:none}.scroll{overflow:visible;border:0;max-width:none}table{font-size:7.5pt}",
        "td.exit{min-width:0}th,td{padding:.15rem .3rem}.tokens th{position:static!important}",
        "tr{break-inside:avoid}section{break-before:page}section:first-of-type{break-before:auto}}",
    ]
)


def explanation_page(answers: Sequence[tuple[str, Explanation]], *, title: str = "Where each token came from") -> str:
    """A self-contained page that explains answers, one after the other.

    Args:
        answers: each with its prompt, as the user wrote it. At least one.
        title: title of the page.
    """
    sections = [_section(number, prompt, one, of=len(answers)) for number, (prompt, one) in enumerate(answers)]
    lead = (
        "An exit after an early layer can emit a token before the model has run all its layers. This page shows which "
        "exit emitted each token, and what every other exit would have said at its position."
    )
    return html_page(title, _STYLE, f'<h1>{escaped(title)}</h1>\n<p class="lead">{lead}</p>\n{"".join(sections)}')


def _section(number: int, prompt: str, one: Explanation, *, of: int) -> str:
    shares = one.by_exit()
    classes = _classes(shares)
    heading = f"<h2>Answer {number + 1} of {of}</h2>\n" if of > 1 else ""
    departs = one.agreement.departure is not None
    notes = "".join(f'<p class="note">{note}</p>\n' for note in _notes(one))
    return (
        f"<section>\n{heading}"
        f'<div class="card prompt"><h3>Prompt</h3><pre dir="auto">{escaped(prompt)}</pre></div>\n'
        f'<p class="verdict{" other" if departs else ""}">{escaped(one.verdict())}</p>\n{notes}'
        f"{_answers(number, one, classes)}\n"
        f"<h3>The exits over the whole answer</h3>\n{_shares(one, shares, classes)}\n"
        f"<h3>Token by token</h3>\n{_reading(one)}\n{_tokens(number, one, shares, classes)}\n</section>\n"
    )


def _classes(shares: Sequence[ExitShare]) -> dict[int, str]:
    """The tint of each layer: one per exit, the last layer without colour."""
    return tints(sorted({share.layer for share in shares}))


def _notes(one: Explanation) -> list[str]:
    notes, request = [], one.request
    if request.coverage is not None:
        coverage = request.coverage
        what = {
            "certified": f"These thresholds are certified for the task {coverage.task}.",
            "full": f"Not covered by the certificate for the task {coverage.task}, so it is full mode’s: ",
            "uncertified": f"Not certified: outside the settings of the certificate for the task {coverage.task}: ",
        }[coverage.status]
        notes.append(escaped(what + (coverage.reason or "")))
    if not request.sampling.greedy:
        drawn = f"Tokens were sampled (temperature {request.sampling.temperature:g}, seed {request.sampling.seed}"
        drawn += " and up)" if request.samples > 1 else ")"
        notes.append(
            f"{drawn}, so an exit may emit another token than its most probable one. Full mode has the same seed."
        )
    if request.mode == "speculative":
        equal = "the tokens are full mode’s" if request.sampling.greedy else "its distribution is full mode’s"
        notes.append(f"Speculative mode: an exit drafts, the full model verifies, so {equal}.")
    return notes


def _answers(number: int, one: Explanation, classes: dict[int, str]) -> str:
    departure = one.agreement.departure
    own = tinted_answer(
        [token.piece for token in one.tokens],
        [classes[_emitter(token).layer] for token in one.tokens],
        titles=[_title(index, token) for index, token in enumerate(one.tokens)],
        different=one.different,
        departure=departure,
        unseen=[_unseen(token) for token in one.tokens],
        link=f"a{number}",
    )
    name = {"threshold": "Early exit", "speculative": "Speculative", "full": "Full mode"}[one.request.mode]
    cards = [f'<div class="card"><h3>{name}</h3><pre dir="auto">{own}</pre></div>']
    if one.request.mode != "full":
        pieces = one.full.pieces
        full = tinted_answer(pieces, [""] * len(pieces), different=one.full_different, departure=departure)
        cards.append(f'<div class="card"><h3>Full mode</h3><pre dir="auto">{full}</pre></div>')
    key = [f'<li><span class="chip {tint}">{_named(layer, one)}</span></li>' for layer, tint in classes.items()]
    if one.request.mode != "full":
        key.append('<li><span class="different">not in the other answer</span></li>')
    if departure is not None:
        key.append('<li><span class="departure">&nbsp;first difference</span></li>')
    return f'<div class="pair">{"".join(cards)}</div>\n<ul class="key">{"".join(key)}</ul>'


def _shares(one: Explanation, shares: Sequence[ExitShare], classes: dict[int, str]) -> str:
    count, rows = len(one.tokens), []
    early = one.request.mode == "threshold"
    for share in shares:
        threshold = "" if share.final else ("—" if share.threshold is None else f"≥ {share.threshold:.3g}")
        cells = [
            *([threshold] if early else []),
            *(f"{each} <small>{each / count:.0%}</small>" for each in (share.emitted, share.agrees)),
            "" if share.final else f"{share.agrees_with_final} <small>{share.agrees_with_final / count:.0%}</small>",
            _percent(share.probability),
        ]
        name = "final exit" if share.final else f"exit {share.layer}"
        rows.append(
            f'<tr><th scope="row"><span class="chip {classes[share.layer]}">{name}</span></th>'
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    heads = [
        "exit after layer",
        *([f"leaves at {_measure(one)}"] if early else []),
        "drafted" if one.request.mode == "speculative" else "emitted",
        "says the answer’s token",
        "says the final exit’s",
        "mean probability",
    ]
    return _table("shares", heads, rows)


def _reading(one: Explanation) -> str:
    """How to read the table of tokens."""
    lines = [
        "Each row is a token of the answer, each column an exit. A cell has the token that the exit finds most "
        "probable after the prompt and the answer before this row, and its probability, also as a bar. If that is "
        "another token than the answer’s, it is bold, with the rank and the probability of the answer’s token."
    ]
    if one.request.mode == "threshold":
        lines.append(
            "The frame marks the exit that emitted the token. All columns come from one pass over the finished text, "
            "so the paler cells, after the frame, did not decide anything."
        )
        if one.request.policy.gated:
            lines.append("A token leaves where the gate expects, before the head runs, that the exit agrees.")
    elif one.request.mode == "speculative":
        lines.append("The frame marks the exit that drafted the token, or the final exit, which accepts or rejects it.")
    return f'<p class="note">{" ".join(lines)}</p>'


def _tokens(number: int, one: Explanation, shares: Sequence[ExitShare], classes: dict[int, str]) -> str:
    speculative = one.request.mode == "speculative"
    heads = ["token", "left at" if one.request.mode == "threshold" else "from", *map(_heading, shares)]
    rows = []
    for index, token in enumerate(one.tokens):
        part = index == one.agreement.departure
        word = _word(token.text)
        if index in one.different:
            word = f'<span class="different">{word}</span>'
        other = f'<small class="mark">full mode: {escaped(one.full_text(index))}</small>' if part else ""
        emitter = _emitter(token)
        by = f'<span class="chip {classes[emitter.layer]}">{"final" if emitter.final else emitter.layer}</span>'
        by += f"<small>{_confidence(one, emitter, token.token.confidence)}</small>"
        if speculative and token.drafted:
            by += "<small>draft, accepted</small>"
        if token.rejected is not None:
            by += f"<small>draft {_word(token.rejected)} rejected</small>"
        cells = "".join(_cell(each, emitter, one, classes) for each in token.exits)
        row = ' class="part"' if part else ""
        rows.append(
            f'<tr id="a{number}-{index}"{row}>'
            f'<th scope="row"><small>{index + 1}</small>{word}{other}</th><td>{by}</td>{cells}</tr>'
        )
    return _table("tokens", heads, rows)


def _heading(share: ExitShare) -> str:
    if share.final:
        return f"final exit<small>layer {share.layer}</small>"
    threshold = "" if share.threshold is None else f"<small>leaves at {share.threshold:.3g}</small>"
    return f"exit {share.layer}{threshold}"


def _cell(each: Prediction, emitter: Prediction, one: Explanation, classes: dict[int, str]) -> str:
    later = (each.layer, each.final) > (emitter.layer, emitter.final)
    decided = one.request.mode == "threshold" and later
    names = ["exit", "agrees" if each.agrees else "says"]
    names += ["emitted", classes[each.layer]] if each.emitted else []
    names += ["later"] if decided else []
    lines = [] if each.agrees else [f"answer’s: rank {each.answer_rank:,}, {_percent(each.answer_probability)}"]
    if one.request.mode == "threshold" and _measure(one) != "probability":
        value = each.gate if one.request.policy.gated else each.confidence
        lines += [] if value is None else [_confidence(one, each, value)]
    if each.leaves and not each.asked and not later and not each.emitted:
        lines.append("sure enough, but not asked")
    small = "".join(f"<small>{line}</small>" for line in lines)
    return (
        f'<td class="{" ".join(names)}" style="--p:{min(max(each.probability, 0), 1):.1%}">'
        f"{_word(each.text)} {_percent(each.probability)}{small}</td>"
    )


def _table(kind: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "\n".join(rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{content}</table></div>'


def _measure(one: Explanation) -> str:
    """What decides whether a token leaves."""
    return "gate" if one.request.policy.gated else one.request.policy.measure


def _confidence(one: Explanation, exit_: Prediction, value: float) -> str:
    """A confidence, with its measure if that is not the probability. The final exit has no gate."""
    measure = one.request.policy.measure if exit_.final else _measure(one)
    return _percent(value) if measure == "probability" else f"{measure} {value:.2f}"


def _emitter(token: ExplainedToken) -> Prediction:
    """The exit that emitted a token; the final one, if the one that did is not among them."""
    return next((each for each in token.exits if each.emitted), token.exits[-1])


def _named(layer: int, one: Explanation) -> str:
    return "final exit" if layer == one.tokens[0].exits[-1].layer else f"exit {layer}"


def _title(index: int, token: ExplainedToken) -> str:
    emitter = _emitter(token)
    name = "final exit" if emitter.final else f"exit {emitter.layer}"
    final = token.exits[-1]
    other = "" if final.agrees else f"; the final exit says “{marked_spaces(final.text)}”"
    return f"token {index + 1}: {name}, confidence {token.token.confidence:.3f}{other}"


def _unseen(token: ExplainedToken) -> str:
    """What stands for a token without text: the name of an end of text, nothing inside a character."""
    return "" if token.piece or token.text.startswith("\ufffd") else token.text


def _word(text: str) -> str:
    return f'<span class="said"><bdi>{escaped(marked_spaces(text))}</bdi></span>'


def _percent(share: float) -> str:
    """A probability, never rounded to 0% or 100%."""
    if share != 0 and share < 0.005:
        return "&lt;1%"
    return "&gt;99%" if 0.995 <= share < 1 else f"{share:.0%}"
