"""How fast training steps are on this device, in the plan's own GFLOP/s: what `resources.assumed_gflops_per_worker` should say.

Runs forward, backward and AdamW of real models on random tokens, without Ray or DeepSpeed, and prints the loss of the first
step beside the rate: about ln of the padded vocabulary where the model is right.

    .venv/bin/python benchmarks/step_rate.py [--size 160M] [--batch 8] [--seq-len 2048] [--vocab 50257] [--precision bf16]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import time

import torch

from decay_core.design import DesignPoint
from decay_core.model import ModelConfig, build_model
from decay_core.recipe import Recipe, parameter_groups
from decay_core.sizes import get_size
from services.study.cost import flops_per_token

POINTS = {
    "mamba2-vector": DesignPoint(decay="mamba2"),
    "simple_decay_p0.99-vector": DesignPoint(decay="simple_decay", p=0.99),
    "mamba2-scalar": DesignPoint(decay="mamba2", granularity="scalar"),
}


def measure(point: DesignPoint, arguments: argparse.Namespace, device: str) -> str:
    """One row of the table."""
    config = ModelConfig(point=point, size=get_size(arguments.size), vocab_size=arguments.vocab)
    model = build_model(config, seed=0)
    names = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]
    model = model.to(device)
    recipe = Recipe(
        steps=100, batch_size=arguments.batch, seq_len=arguments.seq_len, eval_every=100, eval_sequences=1,
        checkpoint_every=100, telemetry_every=100,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=1e-4, fused=device != "cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(arguments.vocab, (arguments.batch, arguments.seq_len), generator=generator).to(device)
    seconds, first = [], math.nan
    for step in range(arguments.steps):
        started = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())  # waits for the device
        first = value if step == 0 else first
        seconds.append(time.perf_counter() - started)
    spent = statistics.median(seconds[2:])
    flops = flops_per_token(config, arguments.seq_len) * tokens.numel()
    return (
        f"| {point.name} | {arguments.size} | {first:.4f} (ln V = {math.log(config.padded_vocab):.4f}) | {names} "
        f"| {tokens.numel() / spent:,.0f} | {flops / spent / 1e9:,.0f} |"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    print(f"{name}, torch {torch.__version__}, {arguments.precision}, batch {arguments.batch} x {arguments.seq_len}")
    print("| point | size | first loss | initial weights | tokens/s | GFLOP/s |\n|---|---|---|---|---|---|")
    for point in POINTS.values():
        print(measure(point, arguments, device), flush=True)


if __name__ == "__main__":
    main()
