"""The table of a pass: every stage and event has one row, and rows lead where they say."""

from itertools import product

import pytest
import torch

from kvtrim.engine.layer import Call
from kvtrim.engine.plan import TABLE, Action, Event, Refusal, Stage, look_up, plan_pass, stage_of
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError, UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find
from kvtrim.types import Probed

PAIRS = list(product(Stage, Event))
PASSES = {  # columns of the passes that bring a session to a stage, of a prompt of 16
    Stage.EMPTY: (),
    Stage.READING: (6,),
    Stage.UNPROBED: (16,),
    Stage.COMPLETE: (16,),
}
TOKENS = {Event.WHOLE: 16, Event.PART: 4, Event.LAST: 10, Event.LATER: 1}


def run(session, columns):
    q, k, v = torch.randn(3, 1, 2, columns, 8).unbind()
    session.begin(1, columns)
    session.attend(0, Call(q, k, v, 1.0))
    session.end()


def session_at(stage, probes):
    session = Session(find("kvzip" if probes else "snapkv", **({} if probes else {"window": 2})),
                      Keep.parse(8), 1, prompt_tokens=16)  # fmt: skip
    for columns in PASSES[stage]:
        run(session, columns)
    return session


def test_every_stage_and_event_has_one_row():
    assert set(TABLE) == set(PAIRS) and len(TABLE) == len(PAIRS)
    assert all(isinstance(row, Action | Refusal) for row in TABLE.values())


@pytest.mark.parametrize("stage", Stage)
def test_sessions_come_to_every_stage(stage):
    session = session_at(stage, probes=stage is Stage.UNPROBED)
    assert stage_of(session.method, session.state, session.prompt_tokens) is stage


@pytest.mark.parametrize(("stage", "event"), PAIRS)
def test_a_row_is_what_happens(stage, event):
    """Refused rows are refused; the others read, cut and lead to the next stage as they say."""
    session, row = session_at(stage, probes=stage is Stage.UNPROBED), TABLE[stage, event]
    if isinstance(row, Refusal):
        with pytest.raises(CacheError, match=row.why):
            look_up(stage, event)
        if event in (Event.PROBE, Event.LAST_PROBE):
            with pytest.raises(CacheError, match=row.why):
                session.begin_probe(2, None, [Probed(0, 4)], event is Event.LAST_PROBE)
        return
    seen = session.seen
    if row.reads == "probe":
        last = event is Event.LAST_PROBE
        session.begin_probe(4, None, [Probed(0, 16)], last)
        q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
        session.attend(0, Call(q, k, v, 1.0))
        session.end()
        assert session.seen == seen and session.state.probed == last
        held = int(session.state.layers[0].store.length.sum())  # heads compete
        assert held == 2 * (8 if row.cuts == "all" else 16)
        return
    run(session, TOKENS[event])
    assert session.seen == seen + TOKENS[event]
    held = int(session.state.layers[0].store.length.max())
    waits = session.method.policy.probes and row.waits
    if row.cuts == "all":
        assert held == (session.seen if waits else 8)
    elif row.cuts == "chunks":
        assert held == session.seen
    else:
        assert held == session.seen if waits else held == 8 + TOKENS[event]


def test_chunks_and_schedules_act_where_the_table_says_so():
    for settings, columns, due in (
        ({"chunks": True}, 6, True),
        ({}, 6, False),
    ):
        session = Session(find("knorm", **settings), Keep.parse(4), 1, prompt_tokens=16)
        given = session.method, session.state, session.keep, columns, [columns], 16
        assert plan_pass(*given).after is due
    for every, due in ((1, True), (2, False), (None, False)):
        session = Session(find("knorm", every=every), Keep.parse(8), 1, prompt_tokens=16)
        run(session, 16)
        plan = plan_pass(session.method, session.state, session.keep, 1, [17], 16)
        assert (plan.reads, plan.after) == ("later", due)


@pytest.mark.parametrize("stage", [Stage.EMPTY, Stage.READING])
def test_what_deeper_layers_read_is_chosen_over_a_whole_prompt(stage):
    session = session_at(stage, probes=False)
    method = find("fastkv", layer=0, window=2)
    with pytest.raises(UsageError, match="whole prompt in one pass"):
        plan_pass(method, session.state, session.keep, 4, [session.seen + 4], 16)
