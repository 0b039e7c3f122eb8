"""The Triton kernels of a vector decay give the definition's numbers and gradients, for every decay, shape and cut."""

import json

import pytest
from interpreted import run_as_script
from vector_cases import Call, distance, tolerance

TILES = {"walk_tiles": 2}
CASES = {
    "mild decay": {"tokens": 100, "heads": 2},
    "median λ of 0.3": {"gate": "fast"},
    "λ from 0 to 1, mixed": {"gate": "mixed", "tokens": 100},
    "whole channels below e^-60": {"gate": "channels", "tokens": 100},
    "λ = 0": {"gate": "zero"},
    "λ = 1": {"gate": "one", "tokens": 130},
    "λ = 0 every other token": {"gate": "alternating"},
    "λ the smallest number": {"gate": "denormal"},
    "a token": {"gate": "mixed", "batch": 2, "tokens": 1, "heads": 2},
    "15 tokens": {"gate": "mixed", "tokens": 15},
    "63 tokens": {"gate": "mixed", "tokens": 63},
    "64 tokens": {"gate": "mixed", "tokens": 64},
    "65 tokens": {"gate": "mixed", "tokens": 65},
    "more keys than values": {"gate": "channels", "k": 128, "v": 64},
    "more values than keys": {"gate": "channels", "v": 136},
    "wide": {"gate": "channels", "k": 128, "v": 128},
    "widest": {"gate": "mixed", "tokens": 20, "k": 256, "v": 72},
    "multiples of 8": {"gate": "mixed", "k": 40, "v": 24},
    "one piece of 128 channels": {"k": 128, "v": 128, "config": {"gradient_key_block": 128}},
    "one piece of 128 channels, exact": {"gate": "channels", "k": 128, "v": 72, "config": {"gradient_key_block": 128}},
    "two tiles in a walk": {"k": 128, "v": 72, "tokens": 130, "config": TILES},
    "two tiles in a walk, one steep": {"gate": "one steep channel", "k": 128, "v": 72, "config": TILES},
    "two tiles in a walk, channels": {"gate": "channels", "k": 72, "v": 32, "tokens": 130, "config": TILES},
    "wide pieces": {
        "k": 128,
        "v": 128,
        "config": {
            "walk_key_block": 128,
            "walk_value_block": 128,
            "rows_value_block": 128,
            "gradient_key_block": 128,
            "gradient_value_block": 128,
        },
    },
    "fused forward pass, all values in one piece": {"gate": "channels", "v": 128, "config": {"walk_value_block": 128}},
    "chunks of 32": {"gate": "mixed", "config": {"chunk": 32}},
    "blocks of 16": {"gate": "fast", "config": {"chunk": 16}},
    "states made again": {"gate": "mixed", "tokens": 130, "config": {"policy": "recompute"}},
    "forward pass split": {"gate": "channels", "tokens": 130, "k": 128, "config": {"walk_key_block": 64}},
    "no states": {"states": False, "gate": "mixed"},
    "bf16 in and out": {"dtype": "bfloat16"},
    "fp16 in and out": {"dtype": "float16", "gate": "mixed"},
}


@pytest.fixture(scope="module")
def reports():
    return run_as_script(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_definition_in_value_and_gradient(reports, case):
    for result, error in reports[case].items():
        assert error <= tolerance(CASES[case], result), result


def test_no_state_is_made_where_none_is_asked_for(reports):
    assert reports["stateless"] == [True, True]


def test_tensors_need_not_be_contiguous(reports):
    assert reports["strided"] is True


def test_two_runs_give_equal_bits(reports):
    assert reports["equal bits"] is True


def test_a_sequence_cut_in_two_gives_the_same(reports):
    assert max(reports["cut in two"]) <= 2e-5


def main():
    from dataclasses import replace

    import torch

    reports = {name: Call(case).errors() for name, case in CASES.items()}

    call = Call({"gate": "mixed", "tokens": 40, "heads": 2, "k": 16})
    reports["stateless"] = [x is None for x in call.forward(want_state=False, want_saved=False)[1:]]
    o, final, saved = call.forward()
    results = [o, final, *call.backward(saved)]

    def equal(others):
        return all(torch.equal(x, y) for x, y in zip(results, others, strict=True) if x is not None)

    reports["equal bits"] = equal([o, final, *call.backward(call.forward()[2])])
    view = Call({"gate": "mixed", "tokens": 40, "heads": 2, "k": 16, "strided": True})
    assert not view.q.is_contiguous()
    others = view.forward()
    reports["strided"] = equal([*others[:2], *view.backward(others[2])])

    def part(tokens, **others):
        fields = {"q_bthk": call.q, "k_bthk": call.k, "v_bthv": call.v}
        fields = {name: x[:, tokens] for name, x in fields.items()}
        return call.forward(**fields, decay=replace(call.decay, x=call.decay.x[:, tokens]), **others)

    early = part(slice(0, 17))
    late = part(slice(17, None), initial_state_nhkv=early[1])
    both = torch.cat([early[0], late[0]], dim=1)
    reports["cut in two"] = [distance(both, o.double()), distance(late[1], final.double())]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
