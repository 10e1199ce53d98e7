"""Training one stage: the objective, the pure step and the loop."""
