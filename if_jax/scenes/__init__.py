"""A small world of captioned pictures: solids on a floor and signs, sampled, drawn, described and read back."""
