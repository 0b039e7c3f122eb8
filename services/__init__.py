"""What runs: one folder per kind of process (data, train, schedule, track, report, study)."""
