"""Process groups, layout, stage-to-stage transfer, data parallelism and optimizer of the exits, watchdog."""
