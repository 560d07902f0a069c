"""What predictions are worth: task metrics and calibration."""
