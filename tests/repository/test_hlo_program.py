"""benchmarks/with_jax/hlo_program.py counts what XLA launches."""

import importlib.util

import paths

PATH = paths.BENCHMARKS / "with_jax" / "hlo_program.py"

PROGRAM = """
HloModule step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = f32[8]{0} scatter(%p, %i, %u), to_apply=%add
  ROOT %add = f32[8]{0} add(%p, %s)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %copy.1 = s32[] copy(%i)
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%copy.1, %f.1)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %f.2 = pred[] fusion(%t), kind=kLoop, calls=%fused
}

%likely (x: f32[8]) -> f32[8] {
  ROOT %f.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
}

%other (x: f32[8]) -> f32[8] {
  %f.4 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %f.5 = f32[8]{0} sort(%f.4), to_apply=%compare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w.1 = (s32[], /*index=1*/f32[8]{0}) while(%t), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  ROOT %c = f32[8]{0} conditional(%p, %a, %b), true_computation=%likely, \
false_computation=%other
}
"""


def test_count():
    spec = importlib.util.spec_from_file_location("hlo_program", PATH)
    hlo_program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hlo_program)
    assert hlo_program.count(PROGRAM) == {
        # Five rounds of two, one of two and its condition, and a branch.
        "kernels": 5 * 2 + 3 + 1,
        "in all": 2 + 3 + 1 + 2,
        "scatters": 1,
        "sorts": 1,
        "branches": 1,
        "f64": "no",
        "loops": "5 ?",
    }
