"""The noise schedule, the samplers and solvers, and the losses: mathematics that knows no network."""
