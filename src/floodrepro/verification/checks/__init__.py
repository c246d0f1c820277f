"""The checks: pure functions from the evidence to an answer, by what they look at: scores, a reference, the run."""
