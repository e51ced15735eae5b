"""One script, one training job; data.py, losses.py and common.py hold what the scripts share."""
