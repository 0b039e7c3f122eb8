"""The vector kernels take packed sequences, cut long ones into segments, and are causal to the bit where that is asked for."""

import json

import pytest
from interpreted import run_as_script
from vector_cases import Call, tolerance

LENGTHS = [0, 1, 17, 64, 65]
SEGMENTS = {"segment": 64, "tokens": 200}  # of 128 and 72
CASES = {
    "packed": {"lengths": LENGTHS, "heads": 2},
    "packed, λ from 0 to 1, mixed": {"lengths": LENGTHS, "gate": "mixed"},
    "packed, empty at the end": {"lengths": [20, 0, 0]},
    "packed, chunks of 16": {"lengths": [17, 0, 65], "gate": "channels", "config": {"chunk": 16}},
    "packed, forward pass split": {"lengths": LENGTHS, "gate": "channels", "config": {"walk_key_block": 64}},
    "packed, states made again": {"lengths": [17, 0, 65], "config": {"policy": "recompute"}},
    "packed, no states": {"lengths": LENGTHS, "states": False},
    "packed, softplus": {"lengths": LENGTHS, "kind": "softplus"},
    "packed, floor, shared key": {"lengths": LENGTHS, "kind": "floor", "shared": True},
    "packed, wide": {"lengths": [17, 0, 1], "k": 128, "v": 72, "gate": "channels"},
    "packed, two tiles": {"lengths": [17, 0, 65], "k": 128, "gate": "channels", "config": {"walk_tiles": 2}},
    "packed, exact": {"lengths": [17, 0, 65], "exact": True},
    "segments": {**SEGMENTS, "heads": 2},
    "segments of two sequences, mixed": {**SEGMENTS, "batch": 2, "gate": "mixed"},
    "segments, no states": {**SEGMENTS, "states": False},
    "segments, forward pass split": {**SEGMENTS, "k": 72, "config": {"walk_key_block": 64, "policy": "recompute"}},
    "segments, two tiles": {**SEGMENTS, "k": 72, "config": {"walk_tiles": 2}},
    "segments, shared key": {**SEGMENTS, "kind": "floor", "shared": True},
    "segments, exact": {**SEGMENTS, "gate": "mixed", "exact": True},
    "segments of packed sequences": {"segment": 64, "lengths": [0, 3, 140, 0, 130], "gate": "mixed"},
    "exact": {"exact": True, "heads": 2},
    "exact, λ from 0 to 1, mixed": {"exact": True, "gate": "mixed"},
    "exact, wide": {"exact": True, "k": 128, "v": 136, "gate": "channels"},
    "exact, one piece of 128 channels": {"exact": True, "k": 128, "v": 72, "config": {"gradient_key_block": 128}},
    "exact, two tiles": {"exact": True, "k": 128, "v": 72, "config": {"walk_tiles": 2}},
    "exact, bf16 log λ": {"exact": True, "dtype": "bfloat16", "x_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def reports():
    return run_as_script(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_definition_in_value_and_gradient(reports, case):
    for result, error in reports[case].items():
        assert error <= tolerance(CASES[case], result), result


@pytest.mark.parametrize("gate", ["mild", "channels"])
def test_later_tokens_never_move_earlier_outputs_where_exact_is_asked_for(reports, gate):
    assert reports["causal"][gate] is True


def test_packed_sequences_give_the_bits_of_each_alone(reports):
    assert reports["alone"] is True


def test_segments_are_really_made(reports):
    assert reports["segments made"] == [2, 5]


def test_tables_of_packed_sequences_have_room_for_any_lengths(reports):
    assert reports["tables"] is True


def spans_of(case):
    """How many spans a walk of one program per head has."""
    from kernels.triton_vector_spans import Sequences

    call = Call(case)
    batch, tokens = call.q.shape[:2]
    spans = Sequences(rows=batch, tokens=tokens, cu_seqlens=call.cu_seqlens).spans(1, 64)
    assert spans.cut
    return spans.count if spans.table is None else int((spans.table[:, 1] > 0).sum())


def causal(gate):
    """Whether the outputs up to t stay the same, to the bit, when everything after t is another draw; and others move."""
    import torch

    call, other = (Call({"exact": True, "gate": gate, "tokens": 200, "segment": 64}, seed=seed) for seed in (0, 1))
    whole = call.forward()[0]
    for t in (0, 63, 130):
        for name in ("q", "k", "v"):
            getattr(other, name)[:, : t + 1] = getattr(call, name)[:, : t + 1]
        other.decay.x[:, : t + 1] = call.decay.x[:, : t + 1]
        other.initial = call.initial
        moved = other.forward()[0]
        if not torch.equal(moved[:, : t + 1], whole[:, : t + 1]) or torch.equal(moved[:, t + 1 :], whole[:, t + 1 :]):
            return False
    return True


def alone():
    """Whether packing changes no bit of a sequence's outputs and final state."""
    from dataclasses import replace

    import torch

    call = Call({"lengths": LENGTHS, "gate": "channels"})
    o, final, _ = call.forward()
    first = 0
    for n, length in enumerate(LENGTHS):
        tokens = slice(first, first + length)
        first += length
        if length:
            rows = {"q_bthk": call.q[:, tokens], "k_bthk": call.k[:, tokens], "v_bthv": call.v[:, tokens]}
            rows |= {"decay": replace(call.decay, x=call.decay.x[:, tokens]), "cu_seqlens": None}
            one, state, _ = call.forward(**rows, initial_state_nhkv=call.initial[n : n + 1])
            if not torch.equal(one, o[:, tokens]) or not torch.equal(state[0], final[n]):
                return False
        elif not torch.equal(final[n], call.initial[n]):
            return False
    return True


def tables():
    """Whether every token lies in one piece, for lengths of every kind."""
    import torch

    from kernels.triton_vector_spans import Sequences

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(0, 40, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        table = Sequences(rows=1, tokens=int(bounds[-1]), cu_seqlens=bounds).chunk_table(16)
        counted = torch.zeros(int(bounds[-1]), dtype=torch.int32)
        numbers = [number for _, count, number in table.tolist() if count]
        for first, count, _ in table.tolist():
            counted[first : first + count] += 1
        if not (counted == 1).all() or numbers != list(range(len(numbers))):
            return False
    return True


def main():
    reports = {name: Call(case).errors() for name, case in CASES.items()}
    reports["segments made"] = [spans_of(CASES[case]) for case in ("segments", "segments of packed sequences")]
    reports |= {"causal": {gate: causal(gate) for gate in ("mild", "channels")}, "alone": alone(), "tables": tables()}
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
