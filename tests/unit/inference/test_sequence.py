"""What a sequence says of its tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.sequence import Sequence, SequenceParams

IDS = st.lists(st.integers(0, 9), max_size=5)
EXIT = 2


@given(IDS, IDS, IDS, st.booleans())
def test_token_ids_from_a_position_are_the_last_of_all(
    prompt: list[int], emitted: list[int], proposals: list[int], is_forced: bool
) -> None:
    forced = tuple(9 - token for token in emitted) if is_forced else ()
    params = SequenceParams(
        request=1,
        sample=0,
        prompt_token_ids=tuple(prompt),
        mode="full",
        policy=ThresholdPolicy(),
        draft=Draft(),
        exits=(EXIT,),
        sampling=Sampling(),
        max_tokens=500,
        max_length=500,
        forced_token_ids=forced,
    )
    seq = Sequence(1, params, tokens=[Token(token, 2, 0.5) for token in emitted], spec_token_ids=proposals)
    assert seq.token_ids() == [*prompt, *(forced or emitted), *proposals]
    assert len(seq.token_ids()) == seq.num_tokens_with_spec
    for start in range(seq.num_tokens_with_spec + 1):
        assert seq.token_ids(start) == seq.token_ids()[start:]
