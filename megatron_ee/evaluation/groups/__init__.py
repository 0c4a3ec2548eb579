"""Whether early exit treats some groups of records worse than the others."""
