"""`python -m if_jax …` is `if-jax …`."""

from if_jax.cli import main

if __name__ == "__main__":
    main()
