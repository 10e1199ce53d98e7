"""Text in: caption cleaning, tokens, and the text encoder's states."""
