"""Training exits: ``step`` computes, ``trainer`` decides when to step, log, validate and save."""
