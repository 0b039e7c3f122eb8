"""One trial on its ranks: the loop, the DeepSpeed engine, checkpoints, randomness and telemetry."""
