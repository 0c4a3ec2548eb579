"""Training exits: the step computes, the trainer decides when, callbacks validate."""
