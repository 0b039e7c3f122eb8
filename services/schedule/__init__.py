"""From missing trials to running workers: the Tune driver, the two backends, submission. The only folder that imports Ray."""
