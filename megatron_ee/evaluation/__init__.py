"""Quality per exit, sweeps, calibration, and how they are shown."""
