"""Data for calibration and evaluation, and statistics gathered over it."""
