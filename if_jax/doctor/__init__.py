"""What `if-jax doctor` looks at before a run costs money: one function for each check."""
