"""Quality as a number: prompts with known truth, and programs that read what was drawn."""
