"""Quality per exit, threshold sweeps and calibration error, as tables, plots and JSON."""
