"""Live ranges sorted into parts: each value by what it is, none twice, and what is left over as such."""

import pytest

from maxi.estimate.memory import memory
from maxi.estimate.work import Layout
from maxi.plan.parts import allocated, from_account, from_program
from tests.estimate.models import work

LAYOUT = Layout(fsdp=4)
WORK = work()  # 4 layers, D = 64, F = 192, V = 1024
ACCOUNT = {
    "argument_size_in_bytes": 3_000_000,
    "output_size_in_bytes": 2_900_100,
    "alias_size_in_bytes": 2_900_000,
    "temp_size_in_bytes": 2_000_000,
    "generated_code_size_in_bytes": 1_000,
}
PROGRAM = """HloModule jit_step, num_partitions=4

ENTRY %main (p0: f32[4,16,192]) -> f32[] {
  %p0 = f32[4,16,192]{2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params['layers']['w_up']"}
  %p1 = s32[16,512]{1,0} parameter(1), metadata={op_name="batch['tokens']"}
  %grad = (s32[], f32[4,16,192]{2,1,0:T(8,128)}) custom-call(%p0), custom_call_target="x"
  %cast = bf16[4,16,192]{2,1,0} convert(%p0)
  %whole = bf16[64,192]{1,0} all-gather(%cast), dimensions={0}
  %kept = bf16[4,16,512,64]{3,2,1,0} custom-call(%p0), custom_call_target="x"
  %near = bf16[4,16,512,64]{3,2,1,0:T(8,128)(2,1)S(1)} custom-call(%p0), custom_call_target="x"
  %logits = f32[4096,256]{1,0} custom-call(%p0), custom_call_target="x"
  ROOT %loss = f32[] custom-call(%logits), custom_call_target="x"
}
"""
ALIVE = """HloLiveRange (max 9):
  Live ranges at 7 (peak):
    p0{}: 49152 bytes (cumulative: 1 bytes)
    p1{}: 32768 bytes (cumulative: 1 bytes)
    grad{1}: 49152 bytes (cumulative: 1 bytes)
    cast{}: 24576 bytes (cumulative: 1 bytes)
    whole{}: 24577 bytes (cumulative: 1 bytes)
    kept{}: 4194304 bytes (cumulative: 1 bytes)
    near{}: 999 bytes (cumulative: 1 bytes)
    logits{}: 1048576 bytes (cumulative: 1 bytes)
    loss{}: 4 bytes (cumulative: 1 bytes)
"""


def test_values_are_sorted_by_what_they_are() -> None:
    account = ACCOUNT | {"temp_size_in_bytes": 6_000_000}
    found, state = from_program(WORK, LAYOUT, PROGRAM, ALIVE, account), memory(WORK, LAYOUT)
    assert (found.parameters, found.optimizer) == (state.parameters, state.optimizer)
    assert (found.gradients, found.weights, found.logits) == (49152, 24576 + 24577, 1048576)
    assert found.activations == 4194304 + 4
    assert found.total == pytest.approx(allocated(account)) and found.other > 0


def test_without_live_ranges_the_model_divides_what_the_compiler_says() -> None:
    found, model = from_account(WORK, LAYOUT, ACCOUNT), memory(WORK, LAYOUT)
    beside = found.gradients + found.weights + found.activations + found.logits
    assert beside == pytest.approx(2_000_000) and found.total == pytest.approx(allocated(ACCOUNT))
    assert found.activations / found.gradients == pytest.approx(model.activations / model.gradients)


def test_results_that_take_an_arguments_place_are_not_counted_twice() -> None:
    assert allocated(ACCOUNT) == 3_000_000 + 2_000_000 + 100 + 1_000
