"""The vector kernels make log λ from what they are given, and its gradient goes back to the activation, gain and offset."""

import json

import pytest
from interpreted import run_as_script
from vector_cases import Call, tolerance

SOFTPLUS, FLOOR = {"kind": "softplus"}, {"kind": "floor"}
CASES = {
    "softplus": {**SOFTPLUS, "heads": 2},
    "softplus, slope of -1": {**SOFTPLUS, "slope": -1.0},
    "softplus without gain": {**SOFTPLUS, "slope": -1 / 16, "gain": False},
    "softplus without offset": {**SOFTPLUS, "offset": False},
    "softplus of x alone": {**SOFTPLUS, "gain": False, "offset": False},
    "softplus far below e^-60": {**SOFTPLUS, "gate": "wild", "tokens": 100},
    "softplus, multiples of 8": {**SOFTPLUS, "gate": "wild", "k": 40, "v": 24},
    "softplus, wide": {**SOFTPLUS, "k": 128, "v": 72, "tokens": 40},
    "softplus, blocks of 16": {**SOFTPLUS, "config": {"chunk": 16}},
    "floor": {**FLOOR, "heads": 2},
    "floor, wild": {**FLOOR, "gate": "wild"},
    "floor, slope of 2": {**FLOOR, "slope": 2.0},
    "floor, batch of 2": {**FLOOR, "batch": 2, "tokens": 20},
    "shared key": {"shared": True, "heads": 2},
    "shared key, λ from 0 to 1, mixed": {"shared": True, "gate": "mixed"},
    "shared key, softplus": {**SOFTPLUS, "shared": True, "slope": -1.0},
    "shared key, floor": {**FLOOR, "shared": True},
    "shared key, wide": {**FLOOR, "shared": True, "k": 128, "v": 128},
    "shared key, two tiles in a walk": {**FLOOR, "shared": True, "k": 128, "v": 128, "config": {"walk_tiles": 2}},
    "softplus, two tiles in a walk": {**SOFTPLUS, "gate": "wild", "k": 72, "config": {"walk_tiles": 2}},
    "shared key, one piece of 128 channels": {**FLOOR, "shared": True, "k": 128, "config": {"gradient_key_block": 128}},
    "shared key, forward pass split": {**FLOOR, "shared": True, "config": {"walk_key_block": 64, "policy": "recompute"}},
}
for dtype in ("bfloat16", "float16", "float32"):
    for x_dtype in ("bfloat16", "float16", "float32"):
        CASES[f"{dtype} tensors, {x_dtype} log λ"] = {"dtype": dtype, "x_dtype": x_dtype, "gate": "fast", "tokens": 40}
CASES |= {
    "bf16 log λ, mixed": {"x_dtype": "bfloat16", "gate": "mixed"},
    "bf16 activation, softplus": {**SOFTPLUS, "dtype": "bfloat16", "x_dtype": "bfloat16"},
    "fp16 activation, floor": {**FLOOR, "dtype": "float16", "x_dtype": "float16", "shared": True},
}


@pytest.fixture(scope="module")
def reports():
    return run_as_script(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_definition_in_value_and_gradient(reports, case):
    for result, error in reports[case].items():
        assert error <= tolerance(CASES[case], result), result


def main():
    print(json.dumps({name: Call(case).errors() for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
