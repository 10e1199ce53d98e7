"""SynthEval: prompts in the world of the scenes, and programs that read what was drawn for them."""
