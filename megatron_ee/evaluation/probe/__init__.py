"""What exits would gain on a model and a text, before anything is tuned."""
