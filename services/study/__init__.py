"""A study on paper: read the file, enumerate its points, plan its trials, remember what was done."""
