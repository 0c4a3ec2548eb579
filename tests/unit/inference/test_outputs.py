from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.outputs import Output, Settings
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft, Token
from megatron_ee.inference.sampling import Sampling

IDS = st.lists(st.integers(0, 9), max_size=5)


@given(IDS, IDS, IDS, st.booleans())
def test_ids_from_a_position_are_the_last_of_all(prompt, said, proposals, follows):
    given_instead = tuple(9 - token for token in said) if follows else ()
    settings = Settings(
        request=1,
        sample=0,
        prompt=tuple(prompt),
        mode="full",
        policy=ExitPolicy(),
        draft=Draft(),
        exits=(),
        sampling=Sampling(),
        max_tokens=20,
        limit=20,
        follow=given_instead,
    )
    output = Output(1, settings, tokens=[Token(token, 2, 0.5) for token in said], proposals=proposals)
    assert output.ids == [*prompt, *(given_instead or said), *proposals]
    assert len(output.ids) == output.known
    for start in range(output.known + 1):
        assert output.ids_from(start) == output.ids[start:]
