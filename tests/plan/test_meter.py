"""The meter: every way a loop's length is written, what counts once and what does not, what waits for collectives."""

import pytest

from maxi.plan import hlo
from maxi.plan.meter import measure

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


def program(entry: str, more: str = "", devices: int = 8) -> str:
    head = f"HloModule jit_step, is_scheduled=true, num_partitions={devices}"
    return f"{head}\n\n{more}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n{entry}\n}}\n"


BODY = f"""
%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %t = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%t), index=1
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  %y = f32[8,128]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%inner, {CYCLES % 100}
  ROOT %out = (s32[], f32[8,128]) tuple(%next, %y)
}}

%inner (a: f32[8,128]) -> f32[8,128] {{
  %a = f32[8,128] parameter(0)
  ROOT %b = f32[8,128] tanh(%a), {CYCLES % 7000}
}}
"""
DIRECT = """
%cond (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(48)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""
FUSED = """
%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] constant(48)
  ROOT %le = pred[] compare(%a, %b), direction=LE
}

%cond (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%compare
}
"""
UNKNOWN = """
%cond (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  ROOT %p = pred[] custom-call(%t), custom_call_target="who-knows"
}
"""
LOOP = """  %p = f32[8,128] parameter(0)
  %zero = s32[] constant(START)
  %start = (s32[], f32[8,128]) tuple(%zero, %p)
  %loop = (s32[], /*index=1*/f32[8,128]) while(%start), condition=%cond, body=%bodyKNOWN
  ROOT %r = f32[8,128] get-tuple-element(%loop), index=1"""


@pytest.mark.parametrize(
    ("condition", "start", "step", "known", "trips", "endless"),
    [
        (DIRECT, 0, 1, "", 48, 0),
        (DIRECT, 3, 2, "", 23, 0),
        (FUSED, 0, 1, "", 49, 0),
        (UNKNOWN, 0, 1, "", 1, 1),
        (UNKNOWN, 0, 1, ', backend_config={"known_trip_count":{"n":"5"}}', 5, 0),
    ],
)
def test_loops_count_as_often_as_they_run(condition: str, start: int, step: int, known: str, trips: int, endless: int) -> None:
    body, loop = BODY.replace("STEP", str(step)), LOOP.replace("START", str(start)).replace("KNOWN", known)
    found = measure(program(loop, body + condition))
    assert (found.cycles, found.endless) == (100 * trips, endless)  # and not the 7,000 inside the fusion


def test_a_loop_in_a_loop_multiplies() -> None:
    outer = BODY.replace("STEP", "1").replace("fusion(%x), kind=kLoop, calls=%inner", "call(%x), to_apply=%again")
    inner = LOOP.replace("START", "0").replace("KNOWN", "").replace("%cond", "%cond2").replace("%body", "%body2")
    again = "%again (p: f32[8,128]) -> f32[8,128] {\n" + inner + "\n}\n"
    second = BODY.replace("STEP", "1").replace("%body", "%body2")
    more = outer.split("%inner (a")[0] + second + DIRECT + DIRECT.replace("%cond", "%cond2") + again
    found = measure(program(LOOP.replace("START", "0").replace("KNOWN", ""), more))
    assert found.cycles == 48 * (100 + 48 * 100)  # the call has cycles of its own here


def test_of_a_condition_the_dearer_branch_counts_but_not_one_taken_rarely() -> None:
    def branch(name: str, cycles: int, source: str = "jit(step)/add") -> str:
        ours = f'metadata={{op_name="{source}"}}, {CYCLES % cycles}'
        inside = f"  %a = f32[8] parameter(0)\n  ROOT %{name}_r = f32[8] negate(%a), {ours}"
        return f"%{name} (a: f32[8]) -> f32[8] {{\n{inside}\n}}\n\n"

    entry = (
        "  %p = f32[8] parameter(0)\n  ROOT %c = f32[8] conditional(%q, %p, %p, %p), branch_computations={%one, %two, %three}"
    )
    more = branch("one", 10) + branch("two", 30) + branch("three", 900, "jit(step)/cond/branch_2_fun/rarely/exp")
    assert measure(program(entry, more)).cycles == 30


ENTRY = """  %p = f32[8,128] parameter(0)
  %g = f32[64,128] all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %s = (f32[8,128], f32[32,128]) all-gather-start(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = f32[32,128] all-gather-done(%s)
  %r = f32[8,128] all-reduce(%p), channel_id=3, replica_groups=mesh['replica'=2, 'fsdp'=4] {'fsdp'}, to_apply=%sum
  %k = bf16[8,128] custom-call(%p), custom_call_target="tpu_custom_call", metadata={kernel_name="attention_forward.3"}
  ROOT %t = f32[8,128] all-to-all(%p), channel_id=4, replica_groups=[1,8]<=[8], backend_config={"chain_id":"7"}"""


def test_collectives_send_what_their_groups_need() -> None:
    found = measure(program(ENTRY))
    by_kind = {(c.kind, c.is_async): c.sent for c in found.collectives.values()}
    given = 8 * 128 * 4
    assert by_kind == {
        ("all-gather", False): 7 * given,
        ("all-gather", True): 3 * given,
        ("all-reduce", False): 2 * given * 3 / 4,
        ("all-to-all", True): given * 7 / 8,
    }
    assert found.sent_blocking == 7 * given + 1.5 * given and found.sent == sum(by_kind.values())
    assert found.kernels == {"attention_forward": 1}


def test_pieces_of_a_chain_are_one_collective() -> None:
    piece = '%name = f32[8,128] all-gather(%p), channel_id=9, replica_groups=[1,8]<=[8], backend_config={"chain_id":"1"}'
    lines = "  %p = f32[8,128] parameter(0)\n  " + piece.replace("name", "a") + "\n  ROOT " + piece.replace("name", "b")
    found = measure(program(lines))
    assert [c.runs for c in found.collectives.values()] == [1] and found.sent == 7 * 8 * 128 * 4


def test_shapes_are_read() -> None:
    shape = "(s32[]{:T(128)}, bf16[48,6,1024]{2,1,0:T(8,128)(2,1)S(1)}, f32[2])"
    assert hlo.arrays(shape) == [("s32", (), False), ("bf16", (48, 6, 1024), True), ("f32", (2,), False)]
    assert hlo.size("(pred[3], bf16[2,2], f8e4m3fn[5], s4[4], f32[])") == 3 + 8 + 5 + 2 + 4
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.read("nothing")


def test_instructions_over_several_lines_are_one() -> None:
    text = program('  %p = f32[2] parameter(0), metadata={op_name="a\nb"}\n  ROOT %r = f32[2] negate(%p)')
    module = hlo.read(text)
    assert list(module.computations[module.entry]) == ["p", "r"] and module.devices == 8
    found = module.instruction("r")
    assert found is not None and found.operands == ["p"] and module.instruction("q") is None
